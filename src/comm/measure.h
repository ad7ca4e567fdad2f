// How long operations take here.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "comm/process_group.h"

namespace coterie {

// Collective. Median seconds of `rounds` operations in a row, of the slowest rank, the same on all. `operation` is
// "all_to_all" (bytes is what a rank sends to all others together), "all_reduce" (fp32, bytes of the vector) or
// "barrier". InvalidArgument for another name.
double measure_operation(ProcessGroup& group, const std::string& operation, int64_t bytes, int rounds);

// Median seconds of `rounds` calls, as this rank sees them.
double median_seconds(int rounds, const std::function<void()>& run);

}  // namespace coterie
