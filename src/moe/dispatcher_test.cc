#include "moe/dispatcher.h"

#include <gtest/gtest.h>

#include "kernels/test_support.h"

namespace coterie {
namespace {

TEST(Dispatcher, GroupsKeptChoicesByExpertInTokenOrder) {
  std::mt19937 random(13);
  NativeThreadPool pool(2);
  for (float capacity_factor : {0.0f, 0.5f}) {
    RouterConfig config;
    config.num_experts = 5;
    config.top_k = 2;
    config.capacity_factor = capacity_factor;
    config.min_capacity = 1;
    const int64_t T = 41;
    const std::vector<float> logits = random_floats(T * 5, random);
    const Routing routing = route(config, logits.data(), T, {.training = true}, pool);
    const Dispatch dispatch = make_dispatch(routing);
    int64_t row = 0;
    for (int32_t e = 0; e < 5; ++e) {
      ASSERT_EQ(dispatch.offset_E1[e], row);
      for (int32_t choice = 0; choice < 2 * T; ++choice) {
        if (routing.expert_ids_TK[choice] != e || !routing.kept_TK[choice]) continue;
        ASSERT_EQ(dispatch.token_R[row], choice / 2);
        ASSERT_EQ(dispatch.choice_R[row], choice);
        ASSERT_EQ(dispatch.weight_R[row], routing.weights_TK[choice]);
        ASSERT_EQ(dispatch.row_TK[choice], row);
        ++row;
      }
    }
    EXPECT_EQ(dispatch.offset_E1[5], row);
    EXPECT_EQ(dispatch.num_rows(), row);
    for (int64_t choice = 0; choice < 2 * T; ++choice) {
      if (!routing.kept_TK[choice]) {
        ASSERT_EQ(dispatch.row_TK[choice], -1);
      }
    }
  }
}

// Ids and kept choices say the same as a Routing; ids beyond the experts, on both sides and beyond 32 bits, are none.
TEST(Dispatcher, BareIdsEqualARouting) {
  std::mt19937 random(17);
  NativeThreadPool pool(2);
  RouterConfig config;
  config.num_experts = 5;
  config.top_k = 2;
  config.capacity_factor = 0.5f;
  const int64_t T = 41;
  const std::vector<float> logits = random_floats(T * 5, random);
  const Routing routing = route(config, logits.data(), T, {.training = true}, pool);
  const Dispatch expected = make_dispatch(routing);
  const int64_t none[] = {-1, 5, int64_t{1} << 32, -(int64_t{1} << 32)};
  std::vector<int64_t> ids_TK(2 * T);
  for (int64_t c = 0; c < 2 * T; ++c) ids_TK[c] = routing.kept_TK[c] ? routing.expert_ids_TK[c] : none[c % 4];
  const Dispatch actual = make_dispatch(ids_TK.data(), routing.weights_TK.data(), T, 2, 5);
  ASSERT_LT(actual.num_rows(), 2 * T);
  EXPECT_EQ(actual.offset_E1, expected.offset_E1);
  EXPECT_EQ(actual.choice_R, expected.choice_R);
  EXPECT_EQ(actual.token_R, expected.token_R);
  EXPECT_EQ(actual.weight_R, expected.weight_R);
  EXPECT_EQ(actual.row_TK, expected.row_TK);
  const std::vector<int32_t> one_expert(3, 0);
  EXPECT_EQ(make_dispatch(one_expert.data(), nullptr, 3, 1, 1).weight_R, std::vector<float>(3, 1.0f));
}

TEST(Dispatcher, NoTokens) {
  RouterConfig config;
  config.num_experts = 3;
  NativeThreadPool pool(1);
  const Dispatch dispatch = make_dispatch(route(config, nullptr, 0, {}, pool));
  EXPECT_EQ(dispatch.num_rows(), 0);
  EXPECT_EQ(dispatch.offset_E1, std::vector<int64_t>(4));
  EXPECT_EQ(dense_dispatch(0).num_rows(), 0);
}

TEST(Dispatcher, DenseIsTheIdentity) {
  const Dispatch dispatch = dense_dispatch(4);
  EXPECT_EQ(dispatch.offset_E1, (std::vector<int64_t>{0, 4}));
  EXPECT_EQ(dispatch.token_R, (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(dispatch.row_TK, dispatch.token_R);
  EXPECT_EQ(dispatch.weight_R, std::vector<float>(4, 1.0f));
}

}  // namespace
}  // namespace coterie
