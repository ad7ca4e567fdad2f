// The router's losses by hand.
#include "train/router_losses.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "coterie/error.h"

namespace coterie {
namespace {

TEST(RouterLosses, CountsAllOrFirstChoices) {
  Routing routing;
  routing.num_experts = 3, routing.top_k = 2, routing.num_tokens = 3;
  routing.expert_ids_TK = {2, 0, 2, 1, 0, 2};
  std::vector<int64_t> all, first;
  count_choices(routing, BalanceChoices::kAll, all);
  count_choices(routing, BalanceChoices::kFirst, first);
  EXPECT_EQ(all, (std::vector<int64_t>{2, 1, 3}));
  EXPECT_EQ(first, (std::vector<int64_t>{1, 0, 2}));
  count_choices(routing, BalanceChoices::kFirst, first);
  EXPECT_EQ(first, (std::vector<int64_t>{2, 0, 4})) << "counts add up";
  EXPECT_EQ(balance_choices_from_name("first"), BalanceChoices::kFirst);
  EXPECT_THROW(balance_choices_from_name("second"), InvalidArgument);
}

TEST(RouterLosses, BalanceIsExpertsTimesShareTimesProbability) {
  const at::Tensor logits = at::tensor({0.0f, std::log(3.0f), 0.0f, 0.0f}).view({2, 2}).requires_grad_();
  // p = mean of (1/4, 3/4) and (1/2, 1/2) = (3/8, 5/8); f = (1/4, 3/4) of a larger batch.
  const at::Tensor loss = balance_loss(logits, {2, 6});
  EXPECT_NEAR(loss.item<double>(), 2 * (0.25 * 0.375 + 0.75 * 0.625), 1e-6);
  loss.backward();
  // Of the second token: dp_1/dx_1 = 1/4, dp_0/dx_1 = -1/4, and a mean of two.
  EXPECT_NEAR(logits.grad()[1][1].item<double>(), 2 * (0.75 - 0.25) * 0.25 / 2, 1e-6);
}

TEST(RouterLosses, ZLossIsTheSquareOfLogsumexp) {
  const at::Tensor logits = at::tensor({0.0f, std::log(3.0f), 0.0f, 0.0f}).view({2, 2});
  const double expected = (std::pow(std::log(4.0), 2) + std::pow(std::log(2.0), 2)) / 2;
  EXPECT_NEAR(z_loss(logits).item<double>(), expected, 1e-6);
}

}  // namespace
}  // namespace coterie
