// A start that fails early: ranks that were told different things must not train together.
#pragma once

#include <string_view>

#include "comm/process_group.h"

namespace coterie {

// Collective. InvalidArgument on every rank, naming the first one whose `text` isn't rank 0's:
//   "rank 2 runs another configuration than rank 0 (hash 91b3..., not 04c7...)" with `what` = "configuration".
void require_same(ProcessGroup& group, std::string_view text, std::string_view what);

}  // namespace coterie
