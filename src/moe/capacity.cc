#include "moe/capacity.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

namespace coterie {
namespace {

float score_of(const Routing& routing, int64_t choice) {
  return routing.scores_TE[choice / routing.top_k * routing.num_experts + routing.expert_ids_TK[choice]];
}

// Low for a high score. Scores are not negative, so their bits are in their order; a NaN comes last.
uint64_t rank_of_score(float score) {
  if (std::isnan(score)) return uint64_t{1} << 32;
  return ~std::bit_cast<uint32_t>(score);
}

uint64_t rank_of_claim(DropPolicy policy, const RandomKey& key, const Routing& routing, int64_t choice) {
  const int64_t t = choice / routing.top_k;
  const auto k = static_cast<uint64_t>(choice % routing.top_k);
  switch (policy) {
    case DropPolicy::kRandom:
      return k << 32 | random_rank(key, t);
    case DropPolicy::kPosition:
      return k << 48 | static_cast<uint64_t>(key.first_token + t);
    case DropPolicy::kProbability:
      return rank_of_score(score_of(routing, choice));
  }
  return 0;
}

// The choices t*K + k, grouped by expert; those of expert e begin at offset_E1[e].
std::vector<int32_t> choices_by_expert(const Routing& routing, const std::vector<int64_t>& offset_E1) {
  std::vector<int32_t> choices(routing.expert_ids_TK.size());
  std::vector<int64_t> next_E(offset_E1.begin(), offset_E1.end() - 1);
  for (size_t choice = 0; choice < choices.size(); ++choice) {
    choices[next_E[routing.expert_ids_TK[choice]]++] = static_cast<int32_t>(choice);
  }
  return choices;
}

// Moves the `capacity` first claims to the front.
void select(std::vector<Claim>& claims, int64_t capacity) {
  if (capacity < static_cast<int64_t>(claims.size())) {
    std::nth_element(claims.begin(), claims.begin() + capacity, claims.end());
  }
}

}  // namespace

Claim claim_of(const RouterConfig& config, const RandomKey& key, const Routing& routing, int64_t choice,
               bool experts_choose) {
  const uint64_t rank = experts_choose ? rank_of_score(score_of(routing, choice))
                                       : rank_of_claim(config.drop_policy, key, routing, choice);
  return {rank, key.first_token * routing.top_k + choice};
}

void drop_over_capacity(const RouterConfig& config, int64_t capacity, const RandomKey& key, Routing& routing,
                        ThreadPool& pool) {
  std::vector<int64_t>& count_E = routing.tokens_per_expert_E;
  std::fill(count_E.begin(), count_E.end(), 0);
  std::fill(routing.kept_TK.begin(), routing.kept_TK.end(), 1);
  for (const int32_t e : routing.expert_ids_TK) ++count_E[e];
  if (*std::max_element(count_E.begin(), count_E.end()) <= capacity) return;

  std::vector<int64_t> offset_E1(count_E.size() + 1);
  std::partial_sum(count_E.begin(), count_E.end(), offset_E1.begin() + 1);
  const std::vector<int32_t> choices = choices_by_expert(routing, offset_E1);
  const int64_t first_choice = key.first_token * routing.top_k;
  pool.run(routing.num_experts, [&](int64_t e, int) {
    if (count_E[e] <= capacity) return;
    std::vector<Claim> claims;
    claims.reserve(static_cast<size_t>(count_E[e]));
    for (int64_t i = offset_E1[e]; i < offset_E1[e + 1]; ++i) {
      claims.push_back(claim_of(config, key, routing, choices[i], /*experts_choose=*/false));
    }
    select(claims, capacity);
    for (int64_t i = capacity; i < count_E[e]; ++i) routing.kept_TK[claims[i].second - first_choice] = 0;
    count_E[e] = capacity;
  });
}

void let_experts_choose(const RouterConfig& config, int64_t capacity, const RandomKey& key, Routing& routing,
                        ThreadPool& pool) {
  const int64_t T = routing.num_tokens, E = routing.num_experts;
  const int64_t taken = std::min(capacity, T);
  std::fill(routing.kept_TK.begin(), routing.kept_TK.end(), 0);
  pool.run(E, [&](int64_t e, int) {
    std::vector<Claim> claims;
    claims.reserve(static_cast<size_t>(T));
    for (int64_t t = 0; t < T; ++t) {
      claims.push_back(claim_of(config, key, routing, t * E + e, /*experts_choose=*/true));
    }
    select(claims, taken);
    for (int64_t i = 0; i < taken; ++i) routing.kept_TK[claims[i].second - key.first_token * E] = 1;
    routing.tokens_per_expert_E[e] = taken;
  });
}

}  // namespace coterie
