// The router against its slow, obvious version and, backwards, against central differences.
#include "moe/router.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "coterie/error.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

// Multiples of 1/2, so that scores tie often.
std::vector<float> coarse_logits(int64_t n, std::mt19937& random) {
  std::vector<float> logits = random_floats(n, random);
  for (float& value : logits) value = std::round(2 * value) / 2;
  return logits;
}

double reference_score(const RouterConfig& config, const double* logits_E, int64_t e) {
  if (config.score_function == ScoreFunction::kSigmoid) return 1 / (1 + std::exp(-logits_E[e]));
  double sum = 0;
  for (int64_t i = 0; i < config.num_experts; ++i) sum += std::exp(logits_E[i] - logits_E[e]);
  return 1 / sum;
}

// Places by the words of the header: round k gives every token, in priority order, its k-th choice.
std::vector<uint8_t> reference_kept(const RouterConfig& config, const Routing& routing,
                                    const std::vector<int32_t>& order) {
  const int64_t K = config.top_k, T = routing.num_tokens;
  std::vector<uint8_t> kept(static_cast<size_t>(T * K));
  std::vector<int64_t> taken(static_cast<size_t>(config.num_experts));
  for (int64_t k = 0; k < K; ++k) {
    for (int32_t t : order) kept[t * K + k] = taken[routing.expert_ids_TK[t * K + k]]++ < config.capacity(T);
  }
  return kept;
}

void check_routing(const RouterConfig& config, const std::vector<float>& logits, int64_t T,
                   const std::vector<int32_t>& order, bool pass_order) {
  const int64_t E = config.num_experts, K = config.top_k;
  const Routing routing = route(config, logits.data(), T, pass_order ? order.data() : nullptr);
  const std::vector<uint8_t> kept = reference_kept(config, routing, order);
  ASSERT_EQ(routing.kept_TK, kept);
  std::vector<int64_t> counts(static_cast<size_t>(E));
  for (int64_t t = 0; t < T; ++t) {
    const std::vector<double> row(logits.begin() + t * E, logits.begin() + (t + 1) * E);
    const float* scores = routing.scores_TE.data() + t * E;
    std::vector<int32_t> ids(static_cast<size_t>(E));
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += reference_score(config, row.data(), ids[k]);
    for (int64_t e = 0; e < E; ++e) {
      // Softmax: the exponential to 2 ulp and |x - max| u, a sum of E terms; sigmoid is cheaper.
      const double expected = reference_score(config, row.data(), e);
      ASSERT_NEAR(scores[e], expected, (static_cast<double>(E) + 40) * kUnitRoundoff * expected);
    }
    for (int64_t k = 0; k < K; ++k) {
      ASSERT_EQ(routing.expert_ids_TK[t * K + k], ids[k]) << "token " << t << " choice " << k;
      const double score = reference_score(config, row.data(), ids[k]);
      const double weight = kept[t * K + k] ? score / (config.normalize ? sum : 1.0) * config.routed_scaling : 0.0;
      ASSERT_NEAR(routing.weights_TK[t * K + k], weight,
                  (2 * static_cast<double>(E + K) + 90) * kUnitRoundoff * weight);
      counts[ids[k]] += kept[t * K + k];
    }
  }
  ASSERT_EQ(routing.tokens_per_expert_E, counts);
}

TEST(Router, AgreesWithTheObviousVersion) {
  std::mt19937 random(11);
  for_each_isa([&] {
    for (int64_t E : {1, 2, 7, 8, 17, 64}) {
      for (int64_t K : {1, 2, 3, 8}) {
        if (K > E) continue;
        for (int bits = 0; bits < 16; ++bits) {
          RouterConfig config;
          config.num_experts = E;
          config.top_k = K;
          config.score_function = bits & 1 ? ScoreFunction::kSigmoid : ScoreFunction::kSoftmax;
          config.normalize = bits >> 1 & 1;
          config.routed_scaling = bits & 1 ? 2.5f : 1.0f;
          config.capacity_factor = bits >> 2 & 1 ? 0.75f : 0.0f;
          config.min_capacity = 2;
          config.validate();
          const int64_t T = 37;
          std::vector<int32_t> order(static_cast<size_t>(T));
          std::iota(order.begin(), order.end(), 0);
          if (bits >> 3 & 1) std::shuffle(order.begin(), order.end(), random);
          check_routing(config, coarse_logits(T * E, random), T, order, bits >> 3 & 1);
        }
      }
    }
  });
}

TEST(Router, NoTokens) {
  RouterConfig config;
  config.num_experts = 4;
  const Routing routing = route(config, nullptr, 0);
  EXPECT_EQ(routing.tokens_per_expert_E, std::vector<int64_t>(4));
  route_backward(config, routing, nullptr, nullptr, nullptr);
}

TEST(Router, BrokenLogitsStillChooseDifferentExperts) {
  RouterConfig config;
  config.num_experts = 5;
  config.top_k = 3;
  config.score_function = ScoreFunction::kSigmoid;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float logits[] = {nan, 1.0f, nan, 2.0f, nan};
  EXPECT_EQ(route(config, logits, 1).expert_ids_TK, (std::vector<int32_t>{3, 1, 0}));
}

// L = sum w gw + sum s gs in doubles, with the choices held fixed.
double loss(const RouterConfig& config, const Routing& routing, const std::vector<double>& logits,
            const std::vector<float>& grad_weights, const std::vector<float>& grad_scores) {
  const int64_t E = config.num_experts, K = config.top_k;
  double total = 0;
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    double sum = 1e-20;
    for (int64_t e = 0; e < E; ++e) total += reference_score(config, &logits[t * E], e) * grad_scores[t * E + e];
    for (int64_t k = 0; k < K; ++k) sum += reference_score(config, &logits[t * E], routing.expert_ids_TK[t * K + k]);
    for (int64_t k = 0; k < K; ++k) {
      const double score = reference_score(config, &logits[t * E], routing.expert_ids_TK[t * K + k]);
      const double weight = score / (config.normalize ? sum : 1.0) * config.routed_scaling;
      if (routing.kept_TK[t * K + k]) total += weight * grad_weights[t * K + k];
    }
  }
  return total;
}

// What the gradient of a token's logits is made of: its terms add up to at most this, since the slopes of
// both score functions are at most 1.
double gradient_bound(const RouterConfig& config, const Routing& routing, int64_t t, const float* grad_weights_K,
                      const float* grad_scores_E) {
  double sum = 0, weights = 0, scores = 0;
  for (int64_t k = 0; k < config.top_k; ++k) {
    sum += routing.scores_TE[t * config.num_experts + routing.expert_ids_TK[t * config.top_k + k]];
    weights += std::abs(grad_weights_K[k]) * config.routed_scaling;
  }
  for (int64_t e = 0; e < config.num_experts; ++e) scores += std::abs(grad_scores_E[e]);
  return 2 * (config.normalize ? weights / sum : weights) + scores;
}

// Scores have a relative error of (E + 40) u and enter a term at most three times. The central difference
// with h = 1e-4 has a truncation error of h^2 / 6 |L'''|, where |L'''| is at most 6 bounds, and a rounding
// error of about 100 sums of 2^-53 |L| / h, below 1e-9 bounds.
TEST(Router, BackwardAgreesWithDifferences) {
  std::mt19937 random(12);
  for (int bits = 0; bits < 16; ++bits) {
    RouterConfig config;
    config.num_experts = 6;
    config.top_k = 3;
    config.score_function = bits & 1 ? ScoreFunction::kSigmoid : ScoreFunction::kSoftmax;
    config.normalize = bits >> 1 & 1;
    config.capacity_factor = bits >> 2 & 1 ? 0.6f : 0.0f;
    config.min_capacity = 1;
    config.routed_scaling = 1.5f;
    const int64_t T = 9, E = 6;
    const std::vector<float> logits = random_floats(T * E, random), grad_weights = random_floats(T * 3, random);
    const std::vector<float> grad_scores = bits >> 3 & 1 ? random_floats(T * E, random) : std::vector<float>(T * E);
    const Routing routing = route(config, logits.data(), T);
    std::vector<float> grad_logits(logits.size());
    route_backward(config, routing, grad_weights.data(), bits >> 3 & 1 ? grad_scores.data() : nullptr,
                   grad_logits.data());
    std::vector<double> x(logits.begin(), logits.end());
    for (size_t i = 0; i < x.size(); ++i) {
      const double h = 1e-4, middle = x[i];
      x[i] = middle + h;
      const double above = loss(config, routing, x, grad_weights, grad_scores);
      x[i] = middle - h;
      const double below = loss(config, routing, x, grad_weights, grad_scores);
      x[i] = middle;
      const int64_t t = static_cast<int64_t>(i) / E;
      const double bound = gradient_bound(config, routing, t, &grad_weights[t * 3], &grad_scores[t * E]);
      const double tolerance = bound * (3 * (E + 40) * kUnitRoundoff + h * h + 1e-9);
      ASSERT_NEAR(grad_logits[i], (above - below) / (2 * h), tolerance) << "bits " << bits << " at " << i;
    }
  }
}

TEST(Router, Capacity) {
  RouterConfig config;
  config.num_experts = 8;
  config.top_k = 2;
  EXPECT_EQ(config.capacity(100), 100);
  config.capacity_factor = 1.0f;
  EXPECT_EQ(config.capacity(100), 25);
  EXPECT_EQ(config.capacity(101), 26);
  EXPECT_EQ(config.capacity(3), 4);  // min_capacity
  config.top_k = 1;
  config.capacity_factor = 1.1f;
  EXPECT_EQ(config.capacity(80), 11);  // not 12: 1.1f is a little above 1.1
}

std::string refusal(const RouterConfig& config) {
  try {
    config.validate();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(Router, ValidateNamesFieldAndValue) {
  RouterConfig config;
  EXPECT_EQ(refusal(config), "[router] num_experts (0) is below 1");
  config.num_experts = 8;
  EXPECT_EQ(refusal(config), "");
  config.top_k = 9;
  EXPECT_EQ(refusal(config), "[router] top_k (9) exceeds num_experts (8)");
  config.top_k = 0;
  EXPECT_EQ(refusal(config), "[router] top_k (0) is below 1");
  config.top_k = 2;
  config.capacity_factor = -1.5f;
  EXPECT_EQ(refusal(config), "[router] capacity_factor (-1.5) is not 0 or a positive number");
  config.capacity_factor = 1.0f;
  config.min_capacity = -1;
  EXPECT_EQ(refusal(config), "[router] min_capacity (-1) is negative");
  EXPECT_EQ(score_function_from_name("sigmoid"), ScoreFunction::kSigmoid);
  EXPECT_EQ(score_function_name(ScoreFunction::kSoftmax), "softmax");
  EXPECT_THROW(score_function_from_name("tanh"), InvalidArgument);
}

}  // namespace
}  // namespace coterie
