// Who gets an expert's places. Legend as in moe/router.h.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "moe/router.h"

namespace coterie {

// Of tokens' choices: sets kept_TK and tokens_per_expert_E of a routing whose expert_ids_TK and
// scores_TE are there.
void drop_over_capacity(DropPolicy policy, int64_t capacity, const RandomKey& key, Routing& routing, ThreadPool& pool);

// Of experts' choices: every expert takes the `capacity` tokens with its highest scores, of equal ones
// the lower. Sets kept_TE and tokens_per_expert_E of a routing with K = E.
void let_experts_choose(int64_t capacity, Routing& routing, ThreadPool& pool);

}  // namespace coterie
