// Who gets an expert's places. Legend as in moe/router.h.
#pragma once

#include <cstdint>
#include <utility>

#include "base/thread_pool.h"
#include "moe/router.h"

namespace coterie {

// How early it comes, and which choice it is, t*K + k with t counted over the whole batch; the lower pair goes first.
using Claim = std::pair<uint64_t, int64_t>;
Claim claim_of(const RouterConfig& config, const RandomKey& key, const Routing& routing, int64_t choice,
               bool experts_choose);

// Of tokens' choices: sets kept_TK and tokens_per_expert_E of a routing whose expert_ids_TK and
// scores_TE are there.
void drop_over_capacity(const RouterConfig& config, int64_t capacity, const RandomKey& key, Routing& routing,
                        ThreadPool& pool);

// Of experts' choices: every expert takes the `capacity` tokens with its highest scores, of equal ones
// the lower. Sets kept_TE and tokens_per_expert_E of a routing with K = E.
void let_experts_choose(const RouterConfig& config, int64_t capacity, const RandomKey& key, Routing& routing,
                        ThreadPool& pool);

}  // namespace coterie
