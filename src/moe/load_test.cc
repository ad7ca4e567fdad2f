#include "moe/load.h"

#include <gtest/gtest.h>

#include <cmath>

namespace coterie {
namespace {

// Six choices: experts 0, 0, 0, 1, 0, 2 of four, one of them dropped.
Routing some_routing() {
  Routing routing;
  routing.num_tokens = 3, routing.num_experts = 4, routing.top_k = 2;
  routing.expert_ids_TK = {0, 1, 0, 2, 0, 0};
  routing.kept_TK = {1, 1, 1, 1, 1, 0};
  routing.tokens_per_expert_E = {3, 1, 1, 0};
  return routing;
}

TEST(Load, CountsChoicesAndPlaces) {
  LoadCounter counter({.num_experts = 4, .top_k = 2});
  for (int i = 0; i < 2; ++i) counter.add(some_routing());
  EXPECT_EQ(counter.chosen_E(), (std::vector<int64_t>{8, 2, 2, 0}));
  const LoadStats stats = counter.stats();
  EXPECT_EQ(stats.tokens_per_expert_E, (std::vector<int64_t>{6, 2, 2, 0}));
  EXPECT_DOUBLE_EQ(stats.balance, 6 / 2.5);
  EXPECT_DOUBLE_EQ(stats.dropped, 1.0 / 6);
  EXPECT_DOUBLE_EQ(stats.max_violation, 8 / 3.0 - 1);
  EXPECT_NEAR(stats.entropy, -(2 / 3.0) * std::log(2 / 3.0) - (1 / 3.0) * std::log(1 / 6.0), 1e-15);
  EXPECT_EQ(stats.dead_experts, 1);
}

TEST(Load, WhereExpertsChooseNothingIsDropped) {
  LoadCounter counter({.num_experts = 4, .chooser = Chooser::kExperts, .capacity_factor = 1.0f});
  Routing routing = some_routing();
  routing.top_k = 4;
  routing.tokens_per_expert_E = {2, 2, 2, 2};
  counter.add(routing);
  const LoadStats stats = counter.stats();
  EXPECT_EQ(stats.dropped, 0);
  EXPECT_EQ(stats.max_violation, 0);
  EXPECT_NEAR(stats.entropy, std::log(4.0), 1e-15);
}

TEST(Load, NothingCounted) {
  const LoadStats stats = LoadCounter({.num_experts = 2}).stats();
  EXPECT_EQ(stats.balance, 0);
  EXPECT_EQ(stats.dropped, 0);
  EXPECT_EQ(stats.entropy, 0);
}

TEST(Load, BiasGoesAgainstTheLoad) {
  float bias[] = {0.5f, 0.5f, 0.5f, 0.5f};
  update_choice_bias({5, 2, 1, 0}, 0.25f, bias);  // the mean is 2
  EXPECT_EQ(bias[0], 0.25f);
  EXPECT_EQ(bias[1], 0.5f);
  EXPECT_EQ(bias[2], 0.75f);
  EXPECT_EQ(bias[3], 0.75f);
}

}  // namespace
}  // namespace coterie
