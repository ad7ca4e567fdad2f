// Ranks of a torch.distributed run as a ProcessGroup, over the messages of its CPU backend (Gloo).
#pragma once

#include <memory>
#include <string>

#include "comm/process_group.h"

namespace coterie {

// `name`: what torch.distributed calls the group, `torch.distributed.group.WORLD.group_name`; its ranks are the world
// of the result. Collective: no messages, but torch's group must exist on all ranks. While it is used, nobody sends
// with torch.distributed.send over the same group. InvalidArgument for an unknown name or a backend that isn't Gloo.
//
// Gloo can't look whether a message has arrived: Work::done() says false until somebody waits, and a wait takes the
// operations that were started earlier first.
std::unique_ptr<ProcessGroup> torch_process_group(const std::string& name, double timeout_s);

}  // namespace coterie
