// Who gets an expert's places when the tokens of a batch are spread over ranks: whoever would on one rank. Legend as
// in moe/router.h.
#pragma once

#include "base/thread_pool.h"
#include "moe/router.h"

namespace coterie {

// What drop_over_capacity() and let_experts_choose() do, for the tokens of all ranks of options.world together, of
// which this routing has some. Their global indices (options.key.first_token on) differ between ranks. Collective
// over the world; a choice costs 16 bytes on the way to its expert's judge and one on the way back, only for experts
// that are over their capacity.
void share_places(const RouterConfig& config, const RouteOptions& options, bool experts_choose, Routing& routing,
                  ThreadPool& pool);

}  // namespace coterie
