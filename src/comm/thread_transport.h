// Ranks that are threads of one process: for tests, and for trying a layout without launching anything.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "comm/process_group.h"
#include "comm/transport.h"

namespace coterie {

// One transport per rank, each for one thread. A peer whose transport is closed or destroyed is lost.
std::vector<std::unique_ptr<Transport>> make_thread_transports(int ranks);

// Runs body(world) on `ranks` threads at once, one per rank; rethrows the exception of the lowest rank that threw.
void run_ranks(int ranks, double timeout_s, const std::function<void(ProcessGroup& world)>& body);

}  // namespace coterie
