#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "coterie/error.h"

namespace coterie {
namespace {

constexpr int kDraws = 20000;

// Logits whose softmax is exactly these probabilities.
std::vector<float> logits_of(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)) + 3.0f);
  return logits;
}

std::map<int32_t, double> frequencies(const std::vector<float>& logits, const SamplingParams& params) {
  std::map<int32_t, double> share;
  for (int i = 0; i < kDraws; ++i) share[sample(logits, params, 0, i)] += 1;
  for (auto& [token, count] : share) count /= kDraws;
  return share;
}

// The share of an event of probability p in n draws has the standard deviation sqrt(p (1 - p) / n);
// five of them make a false alarm a matter of one in a million.
void expect_shares(const std::map<int32_t, double>& share, const std::map<int32_t, double>& expected) {
  EXPECT_EQ(share.size(), expected.size());
  for (const auto& [token, p] : expected) {
    ASSERT_TRUE(share.contains(token)) << token;
    EXPECT_NEAR(share.at(token), p, 5 * std::sqrt(p * (1 - p) / kDraws)) << token;
  }
}

const std::vector<double> kProbabilities = {0.1, 0.4, 0.05, 0.25, 0.2};

TEST(Sampler, GreedyTakesTheFirstLargest) {
  const std::vector<float> logits = {1, 3, 2, 3};
  EXPECT_EQ(sample(logits, {.temperature = 0}, 0, 0), 1);
}

TEST(Sampler, FollowsTheDistribution) {
  expect_shares(frequencies(logits_of(kProbabilities), {.temperature = 1}),
                {{0, 0.1}, {1, 0.4}, {2, 0.05}, {3, 0.25}, {4, 0.2}});
}

TEST(Sampler, TemperatureComesFirst) {
  // p^(1/T) with T = 0.5 squares: .01 .16 .0025 .0625 .04, sum .275. After it the first two hold
  // .2225 / .275 = 81 %, which top_p = 0.8 accepts; without it they would hold 65 % and a third stay.
  const double sum = 0.16 + 0.0625;
  expect_shares(frequencies(logits_of(kProbabilities), {.temperature = 0.5f, .top_p = 0.8f}),
                {{1, 0.16 / sum}, {3, 0.0625 / sum}});
}

TEST(Sampler, TopKThenTopP) {
  expect_shares(frequencies(logits_of(kProbabilities), {.temperature = 1, .top_k = 3}),
                {{1, 0.4 / 0.85}, {3, 0.25 / 0.85}, {4, 0.2 / 0.85}});
  expect_shares(frequencies(logits_of(kProbabilities), {.temperature = 1, .top_p = 0.7f}),
                {{1, 0.4 / 0.85}, {3, 0.25 / 0.85}, {4, 0.2 / 0.85}});
  // Among the three, the first two hold 76 %: top_p is measured after top_k.
  expect_shares(frequencies(logits_of(kProbabilities), {.temperature = 1, .top_k = 3, .top_p = 0.7f}),
                {{1, 0.4 / 0.65}, {3, 0.25 / 0.65}});
  expect_shares(frequencies(logits_of(kProbabilities), {.temperature = 1, .top_p = 0.01f}), {{1, 1.0}});
}

TEST(Sampler, TokensAsLikelyAsTheKthStay) {
  const std::vector<float> logits = {0, 1, 1, 0.5f};
  const auto share = frequencies(logits, {.temperature = 1, .top_k = 1});
  expect_shares(share, {{1, 0.5}, {2, 0.5}});
}

TEST(Sampler, DependsOnSeedAndPositionAlone) {
  const std::vector<float> logits = logits_of(kProbabilities);
  int different = 0;
  for (int i = 0; i < 200; ++i) {
    const int32_t token = sample(logits, {.temperature = 1, .seed = 7}, 0, i);
    EXPECT_EQ(token, sample(logits, {.temperature = 1, .seed = 7}, 0, i));
    different += token != sample(logits, {.temperature = 1, .seed = 8}, 0, i);
  }
  EXPECT_GT(different, 100);  // two independent draws agree with probability 0.275
}

// A model that is broken must not break what runs beside it.
TEST(Sampler, ChoosesSomethingAmongNumbersThatAreNone) {
  const std::vector<float> logits = {1, NAN, 2, INFINITY};
  for (const SamplingParams& params :
       {SamplingParams{.temperature = 1, .top_p = 0.9f}, SamplingParams{.temperature = 1, .top_k = 2, .top_p = 0.9f},
        SamplingParams{.temperature = 1, .top_p = 0.9f, .min_p = 0.1f}}) {
    const int32_t token = sample(logits, params, 0, 0);
    EXPECT_TRUE(token >= 0 && token < 4) << token;
  }
}

TEST(SamplingParams, RefusesByNameAndValue) {
  const auto refusal = [](const SamplingParams& params) {
    try {
      params.validate();
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal({}), "accepted");
  EXPECT_EQ(refusal({.top_p = 1.5f}), "top_p: 1.5 is not in (0, 1]");
  EXPECT_EQ(refusal({.top_p = NAN}), "top_p: nan is not in (0, 1]");
  EXPECT_EQ(refusal({.logit_bias = {{3, INFINITY}}}), "logit_bias[3]: inf is not a number below infinity");
  EXPECT_EQ(refusal({.top_k = -1}), "top_k: -1 is negative");
  EXPECT_EQ(refusal({.temperature = -0.1f}), "temperature: -0.1 is not zero or positive");
  EXPECT_EQ(refusal({.max_new_tokens = 0}), "max_new_tokens: 0 is below 1");
}

}  // namespace
}  // namespace coterie
