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

constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
const RandomKey kKey = {.seed = 31, .step = 7, .layer = 3, .first_token = 1000};

NativeThreadPool& pool() {
  static NativeThreadPool pool(3);
  return pool;
}

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

// Indices of the values, highest first, of equal ones the lower first.
std::vector<int32_t> sorted_ids(const std::vector<float>& values) {
  std::vector<int32_t> ids(values.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  return ids;
}

// The groups that a token may choose from.
std::vector<int32_t> reference_groups(const RouterConfig& config, const std::vector<float>& values_E) {
  const auto size = static_cast<size_t>(config.experts_per_group());
  std::vector<float> group_values;
  for (size_t first = 0; first < values_E.size(); first += size) {
    std::vector<float> group(values_E.begin() + first, values_E.begin() + first + size);
    std::sort(group.rbegin(), group.rend());
    group_values.push_back(config.group_score == GroupScore::kMax ? group[0] : group[0] + group[1]);
  }
  std::vector<int32_t> groups = sorted_ids(group_values);
  groups.resize(static_cast<size_t>(config.top_k_groups));
  return groups;
}

// The experts of these groups, best first.
std::vector<int32_t> reference_order(const RouterConfig& config, const std::vector<float>& values_E,
                                     const std::vector<int32_t>& groups) {
  const auto size = static_cast<int32_t>(config.experts_per_group());
  std::vector<int32_t> order;
  for (const int32_t e : sorted_ids(values_E)) {
    if (std::count(groups.begin(), groups.end(), e / size)) order.push_back(e);
  }
  return order;
}

// One row of scores as choices are made by them.
std::vector<float> reference_values(const std::vector<float>& scores_TE, int64_t t, int64_t E, const float* bias_E) {
  std::vector<float> values(scores_TE.begin() + t * E, scores_TE.begin() + (t + 1) * E);
  for (int64_t e = 0; e < E && bias_E; ++e) values[e] += bias_E[e];
  return values;
}

// The scores of logits + Gumbel noise: those of a router that is given them.
std::vector<float> noisy_scores(const RouterConfig& config, std::vector<float> logits_TE, int64_t T) {
  const int64_t E = config.num_experts;
  std::vector<float> noise_E(static_cast<size_t>(E));
  for (int64_t t = 0; t < T; ++t) {
    gumbel_noise(kKey, t, E, noise_E.data());
    for (int64_t e = 0; e < E; ++e) logits_TE[t * E + e] += noise_E[e];
  }
  const RouterConfig plain{.num_experts = E, .score_function = config.score_function};
  return route(plain, logits_TE.data(), T, {}, pool()).scores_TE;
}

std::vector<int32_t> reference_ids(const RouterConfig& config, const std::vector<float>& logits_TE,
                                   const Routing& routing, const RouteOptions& options) {
  const int64_t T = routing.num_tokens, E = config.num_experts, K = config.top_k;
  const ChoiceNoise noise = options.training ? config.choice_noise : ChoiceNoise::kNone;
  const std::vector<float> noisy = noisy_scores(config, logits_TE, T);
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < T; ++t) {
    const auto clean = reference_values(routing.scores_TE, t, E, options.choice_bias_E);
    const auto with_noise = reference_values(noisy, t, E, options.choice_bias_E);
    const auto& deciding = noise == ChoiceNoise::kRSample ? with_noise : clean;
    const std::vector<int32_t> groups = reference_groups(config, deciding);
    std::vector<int32_t> order = reference_order(config, deciding, groups);
    if (noise == ChoiceNoise::kSecondExpert) {
      const int32_t first = order[0];
      order = reference_order(config, with_noise, groups);
      std::erase(order, first);
      order.insert(order.begin(), first);
    }
    ids.insert(ids.end(), order.begin(), order.begin() + K);
  }
  return ids;
}

// Places by the words of DropPolicy: claims come in order, and an expert takes the first.
std::vector<uint8_t> reference_kept(const RouterConfig& config, const Routing& routing, bool training) {
  const int64_t K = config.top_k, T = routing.num_tokens, E = config.num_experts;
  std::vector<int32_t> tokens(static_cast<size_t>(T)), claims;
  std::iota(tokens.begin(), tokens.end(), 0);
  if (config.drop_policy == DropPolicy::kRandom) {
    std::stable_sort(tokens.begin(), tokens.end(),
                     [](int32_t a, int32_t b) { return random_rank(kKey, a) < random_rank(kKey, b); });
  }
  for (int64_t k = 0; k < K; ++k) {
    for (const int32_t t : tokens) claims.push_back(static_cast<int32_t>(t * K + k));
  }
  if (config.drop_policy == DropPolicy::kProbability) {
    const auto score = [&](int32_t claim) { return routing.scores_TE[claim / K * E + routing.expert_ids_TK[claim]]; };
    std::sort(claims.begin(), claims.end());
    std::stable_sort(claims.begin(), claims.end(), [&](int32_t a, int32_t b) { return score(a) > score(b); });
  }
  std::vector<uint8_t> kept(static_cast<size_t>(T * K));
  std::vector<int64_t> taken(static_cast<size_t>(E));
  for (const int32_t claim : claims) {
    kept[claim] = taken[routing.expert_ids_TK[claim]]++ < config.capacity(T, training);
  }
  return kept;
}

// Every expert sorts all tokens by its own score and takes the first.
std::vector<uint8_t> reference_taken(const RouterConfig& config, const Routing& routing) {
  const int64_t T = routing.num_tokens, E = config.num_experts;
  std::vector<uint8_t> kept(static_cast<size_t>(T * E));
  for (int64_t e = 0; e < E; ++e) {
    std::vector<float> column;
    for (int64_t t = 0; t < T; ++t) column.push_back(routing.scores_TE[t * E + e]);
    std::vector<int32_t> tokens = sorted_ids(column);
    tokens.resize(static_cast<size_t>(std::min(T, config.capacity(T, true))));
    for (const int32_t t : tokens) kept[t * E + e] = 1;
  }
  return kept;
}

// What the scores of a token's choices are divided by, given the scores of its K choices.
double reference_divisor(const RouterConfig& config, const Routing& routing, int64_t t,
                         const std::vector<double>& scores_K) {
  const bool over_kept = config.normalize_over == NormalizeOver::kKept || config.chooser == Chooser::kExperts;
  double sum = 0;
  for (int64_t k = 0; k < routing.top_k; ++k) {
    if (!over_kept || routing.kept_TK[t * routing.top_k + k]) sum += scores_K[k];
  }
  if (!config.normalize) return 1;
  return over_kept ? std::max(sum, kEpsilon) : sum + 1e-20;
}

std::vector<double> scores_of_choices(const RouterConfig& config, const Routing& routing, int64_t t,
                                      const double* logits_E) {
  std::vector<double> scores;
  for (int64_t k = 0; k < routing.top_k; ++k) {
    scores.push_back(reference_score(config, logits_E, routing.expert_ids_TK[t * routing.top_k + k]));
  }
  return scores;
}

void check_weights(const RouterConfig& config, const std::vector<float>& logits_TE, const Routing& routing) {
  const int64_t E = config.num_experts, K = routing.top_k;
  const std::vector<double> logits(logits_TE.begin(), logits_TE.end());
  std::vector<int64_t> counts(static_cast<size_t>(E));
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    for (int64_t e = 0; e < E; ++e) {
      // Softmax: the exponential to 2 ulp and |x - max| u, a sum of E terms; sigmoid is cheaper.
      const double expected = reference_score(config, &logits[t * E], e);
      ASSERT_NEAR(routing.scores_TE[t * E + e], expected, (static_cast<double>(E) + 40) * kUnitRoundoff * expected);
    }
    const std::vector<double> scores_K = scores_of_choices(config, routing, t, &logits[t * E]);
    const double divisor = reference_divisor(config, routing, t, scores_K);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t choice = t * K + k;
      const double weight = routing.kept_TK[choice] ? scores_K[k] / divisor * config.routed_scaling : 0.0;
      ASSERT_NEAR(routing.weights_TK[choice], weight, (2 * static_cast<double>(E + K) + 90) * kUnitRoundoff * weight);
      counts[routing.expert_ids_TK[choice]] += routing.kept_TK[choice];
    }
  }
  ASSERT_EQ(routing.tokens_per_expert_E, counts);
}

void check_routing(const RouterConfig& config, const std::vector<float>& logits, int64_t T,
                   const RouteOptions& options) {
  const Routing routing = route(config, logits.data(), T, options, pool());
  if (options.training && config.chooser == Chooser::kExperts) {
    ASSERT_EQ(routing.top_k, config.num_experts);
    ASSERT_EQ(routing.kept_TK, reference_taken(config, routing));
  } else {
    ASSERT_EQ(routing.top_k, config.top_k);
    ASSERT_EQ(routing.expert_ids_TK, reference_ids(config, logits, routing, options));
    ASSERT_EQ(routing.kept_TK, reference_kept(config, routing, options.training));
  }
  check_weights(config, logits, routing);
}

// Any configuration that holds, with every field drawn at random.
RouterConfig random_config(int64_t E, int64_t K, std::mt19937& random) {
  const auto coin = [&] { return random() % 2 == 0; };
  RouterConfig config{.num_experts = E, .top_k = K};
  config.score_function = coin() ? ScoreFunction::kSigmoid : ScoreFunction::kSoftmax;
  config.normalize = coin();
  config.normalize_over = coin() ? NormalizeOver::kKept : NormalizeOver::kChosen;
  config.routed_scaling = coin() ? 2.5f : 1.0f;
  config.capacity_factor = coin() ? 0.75f : 0.0f;
  config.eval_capacity_factor = coin() ? 0.5f : 0.0f;
  config.min_capacity = 2;
  config.drop_policy = static_cast<DropPolicy>(random() % 3);
  if (config.capacity_factor > 0 && random() % 5 == 0) {
    config.chooser = Chooser::kExperts;
    return config;
  }
  config.choice_bias = coin();
  config.choice_noise = static_cast<ChoiceNoise>(random() % (K == 2 ? 3 : 2));
  const std::vector<int64_t> divisors = {2, 4, 7, 8};
  const int64_t G = divisors[random() % divisors.size()];
  if (E % G == 0 && coin()) {
    const int64_t least = (K * G + E - 1) / E;
    config.num_groups = G;
    config.top_k_groups = least + static_cast<int64_t>(random() % static_cast<uint64_t>(G - least + 1));
    config.group_score = E / G >= 2 && coin() ? GroupScore::kTopTwo : GroupScore::kMax;
  }
  return config;
}

TEST(Router, AgreesWithTheObviousVersion) {
  std::mt19937 random(11);
  for_each_isa([&] {
    for (int64_t E : {1, 2, 7, 8, 16, 28, 64, 200}) {
      for (int64_t K : {1, 2, 3, 8, 16}) {
        for (int trial = 0; trial < 16 && K <= E; ++trial) {
          const RouterConfig config = random_config(E, K, random);
          config.validate();
          const std::vector<float> bias = coarse_logits(E, random);
          const RouteOptions options{
              .training = random() % 4 != 0, .key = kKey, .choice_bias_E = config.choice_bias ? bias.data() : nullptr};
          ASSERT_NO_FATAL_FAILURE(check_routing(config, coarse_logits(37 * E, random), 37, options));
        }
      }
    }
  });
}

// A batch large enough for many tasks.
TEST(Router, DoesNotDependOnTheNumberOfThreads) {
  std::mt19937 random(12);
  NativeThreadPool alone(1);
  for (int trial = 0; trial < 24; ++trial) {
    const int64_t T = 1500, E = 16;
    const RouterConfig config = random_config(E, 2, random);
    const std::vector<float> logits = coarse_logits(T * E, random);
    const RouteOptions options{.training = true, .key = kKey};
    const Routing one = route(config, logits.data(), T, options, alone);
    const Routing many = route(config, logits.data(), T, options, pool());
    ASSERT_EQ(one.expert_ids_TK, many.expert_ids_TK);
    ASSERT_EQ(one.kept_TK, many.kept_TK);
    ASSERT_EQ(one.weights_TK, many.weights_TK);
    const std::vector<float> grad_weights = random_floats(T * one.top_k, random);
    std::vector<float> grad_one(logits.size()), grad_many(logits.size());
    route_backward(config, one, grad_weights.data(), nullptr, grad_one.data(), alone);
    route_backward(config, many, grad_weights.data(), nullptr, grad_many.data(), pool());
    ASSERT_EQ(grad_one, grad_many);
  }
}

TEST(Router, NoTokens) {
  for (const Chooser chooser : {Chooser::kTokens, Chooser::kExperts}) {
    const RouterConfig config{.num_experts = 4, .chooser = chooser, .capacity_factor = 1.0f};
    const Routing routing = route(config, nullptr, 0, {.training = true}, pool());
    EXPECT_EQ(routing.tokens_per_expert_E, std::vector<int64_t>(4));
    route_backward(config, routing, nullptr, nullptr, nullptr, pool());
  }
}

TEST(Router, BrokenLogitsStillChooseDifferentExperts) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float logits[] = {nan, 1.0f, nan, 2.0f, nan, nan};
  RouterConfig config{.num_experts = 6, .top_k = 3, .score_function = ScoreFunction::kSigmoid};
  EXPECT_EQ(route(config, logits, 1, {}, pool()).expert_ids_TK, (std::vector<int32_t>{3, 1, 0}));
  config.score_function = ScoreFunction::kSoftmax;  // of which one NaN makes all NaN
  EXPECT_EQ(route(config, logits, 1, {}, pool()).expert_ids_TK, (std::vector<int32_t>{0, 1, 2}));
  config.num_groups = 2;
  config.group_score = GroupScore::kTopTwo;
  EXPECT_EQ(route(config, logits, 1, {}, pool()).expert_ids_TK, (std::vector<int32_t>{0, 1, 2}));
  config.num_groups = 1;
  config.top_k = 2;
  config.choice_noise = ChoiceNoise::kSecondExpert;
  const std::vector<int32_t> ids = route(config, logits, 1, {.training = true, .key = kKey}, pool()).expert_ids_TK;
  EXPECT_NE(ids[0], ids[1]);
}

// What isn't a number is the first to be dropped, and the last that an expert takes.
TEST(Router, BrokenScoresGetNoPlace) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float logits[] = {nan, nan, 1.0f, 2.0f};
  RouterConfig config{.num_experts = 2,
                      .top_k = 2,
                      .capacity_factor = 0.5f,
                      .min_capacity = 1,
                      .drop_policy = DropPolicy::kProbability};
  EXPECT_EQ(route(config, logits, 2, {.training = true}, pool()).kept_TK, (std::vector<uint8_t>{0, 0, 1, 1}));
  config.chooser = Chooser::kExperts;
  EXPECT_EQ(route(config, logits, 2, {.training = true}, pool()).kept_TK, (std::vector<uint8_t>{0, 0, 1, 1}));
}

TEST(Router, BiasChoosesAndDoesNotWeigh) {
  const RouterConfig config{.num_experts = 3, .score_function = ScoreFunction::kSigmoid, .choice_bias = true};
  const float logits[] = {0.0f, 1.0f, 2.0f}, bias[] = {0.5f, 0.0f, 0.0f};
  const Routing routing = route(config, logits, 1, {.choice_bias_E = bias}, pool());
  EXPECT_EQ(routing.expert_ids_TK, std::vector<int32_t>{0});
  EXPECT_EQ(routing.weights_TK, std::vector<float>{0.5f});
}

// The same tokens as parts of one batch or of two meet the same noise.
// The definition: a softmax over the experts that are left and close enough, one choice after the other.
TEST(Router, SparsemixerSharesAmongNeighbours) {
  std::mt19937 random(40);
  for (const float epsilon : {0.0f, 0.01f, 0.3f}) {
    const RouterConfig config = {
        .num_experts = 9, .top_k = 2, .score_function = ScoreFunction::kSparsemixer, .sparsemixer_epsilon = epsilon};
    const int64_t T = 50, E = config.num_experts;
    const std::vector<float> logits_TE = coarse_logits(T * E, random);
    const Routing routing = route(config, logits_TE.data(), T, {}, pool());
    for (int64_t t = 0; t < T; ++t) {
      std::vector<float> left(logits_TE.begin() + t * E, logits_TE.begin() + (t + 1) * E);
      for (int64_t k = 0; k < 2; ++k) {
        const int32_t best = sorted_ids(left)[0];
        double sum = 0;
        for (int64_t e = 0; e < E; ++e) {
          if (std::isinf(left[e])) continue;
          const float factor = std::max(std::abs(left[e]), left[best]);
          if (!((left[best] - left[e]) / factor > 2 * epsilon)) sum += std::exp(double{left[e]} - left[best]);
        }
        ASSERT_EQ(routing.expert_ids_TK[t * 2 + k], best);
        ASSERT_NEAR(routing.weights_TK[t * 2 + k], 1 / sum, 16 * kEpsilon);  // nine exponentials, their sum, a quotient
        left[best] = -std::numeric_limits<float>::infinity();
      }
    }
    EXPECT_THROW(route(config, logits_TE.data(), T, {.training = true}, pool()), InvalidArgument);
  }
}

TEST(Router, RandomChoicesFollowTheGlobalToken) {
  std::mt19937 random(15);
  const int64_t T = 20, E = 8, cut = 9;
  const RouterConfig config{.num_experts = E, .top_k = 2, .choice_noise = ChoiceNoise::kRSample};
  const std::vector<float> logits = random_floats(T * E, random);
  const Routing whole = route(config, logits.data(), T, {.training = true, .key = kKey}, pool());
  RandomKey key = kKey;
  Routing part = route(config, logits.data(), cut, {.training = true, .key = key}, pool());
  std::vector<int32_t> ids = part.expert_ids_TK;
  key.first_token += cut;
  part = route(config, logits.data() + cut * E, T - cut, {.training = true, .key = key}, pool());
  ids.insert(ids.end(), part.expert_ids_TK.begin(), part.expert_ids_TK.end());
  EXPECT_EQ(ids, whole.expert_ids_TK);
  EXPECT_NE(route(config, logits.data(), T, {}, pool()).expert_ids_TK, whole.expert_ids_TK) << "noise in training only";
}

// L = sum w gw + sum s gs in doubles, with the choices held fixed.
double loss(const RouterConfig& config, const Routing& routing, const std::vector<double>& logits,
            const std::vector<float>& grad_weights, const std::vector<float>& grad_scores) {
  const int64_t E = config.num_experts, K = routing.top_k;
  double total = 0;
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    for (int64_t e = 0; e < E; ++e) total += reference_score(config, &logits[t * E], e) * grad_scores[t * E + e];
    const std::vector<double> scores_K = scores_of_choices(config, routing, t, &logits[t * E]);
    const double divisor = reference_divisor(config, routing, t, scores_K);
    for (int64_t k = 0; k < K; ++k) {
      const double weight = scores_K[k] / divisor * config.routed_scaling;
      if (routing.kept_TK[t * K + k]) total += weight * grad_weights[t * K + k];
    }
  }
  return total;
}

// What the gradient of a token's logits is made of: its terms add up to at most this, since the slopes of
// both score functions are at most 1.
double gradient_bound(const RouterConfig& config, const Routing& routing, int64_t t, const double* logits_E,
                      const float* grad_weights_K, const float* grad_scores_E) {
  double weights = 0, scores = 0;
  for (int64_t k = 0; k < routing.top_k; ++k) weights += std::abs(grad_weights_K[k]) * config.routed_scaling;
  for (int64_t e = 0; e < config.num_experts; ++e) scores += std::abs(grad_scores_E[e]);
  return 2 * weights / reference_divisor(config, routing, t, scores_of_choices(config, routing, t, logits_E)) + scores;
}

void check_gradient(const RouterConfig& config, const std::vector<float>& logits, int64_t T, bool with_scores,
                    std::mt19937& random) {
  const int64_t E = config.num_experts;
  const Routing routing = route(config, logits.data(), T, {.training = true, .key = kKey}, pool());
  const int64_t K = routing.top_k;
  const std::vector<float> grad_weights = random_floats(T * K, random);
  const std::vector<float> grad_scores = with_scores ? random_floats(T * E, random) : std::vector<float>(T * E);
  std::vector<float> grad_logits(logits.size());
  route_backward(config, routing, grad_weights.data(), with_scores ? grad_scores.data() : nullptr, grad_logits.data(),
                 pool());
  std::vector<double> x(logits.begin(), logits.end());
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t t = static_cast<int64_t>(i) / E;
    const double bound = gradient_bound(config, routing, t, &x[t * E], &grad_weights[t * K], &grad_scores[t * E]);
    const double h = 1e-4, middle = x[i];
    x[i] = middle + h;
    const double above = loss(config, routing, x, grad_weights, grad_scores);
    x[i] = middle - h;
    const double below = loss(config, routing, x, grad_weights, grad_scores);
    x[i] = middle;
    // The difference of two sums of T bounded terms loses their roundings, divided by 2h.
    const double tolerance = bound * (3 * (E + 40) * kUnitRoundoff + h * h + 1e-9);
    ASSERT_NEAR(grad_logits[i], (above - below) / (2 * h), tolerance) << "at " << i;
  }
}

TEST(Router, GradientIsTheDifferenceQuotient) {
  std::mt19937 random(12);
  for (int trial = 0; trial < 160; ++trial) {
    const RouterConfig config = random_config(8, 3, random);
    SCOPED_TRACE(trial);
    ASSERT_NO_FATAL_FAILURE(check_gradient(config, random_floats(11 * 8, random), 11, trial % 2 == 0, random));
  }
}

// Where the kept scores add up to less than the epsilon, the divisor is a constant.
TEST(Router, TinyKeptScoresAreDividedByTheEpsilon) {
  const RouterConfig config{.num_experts = 2,
                            .top_k = 2,
                            .score_function = ScoreFunction::kSigmoid,
                            .normalize = true,
                            .normalize_over = NormalizeOver::kKept};
  const float logits[] = {-20.0f, -21.0f}, grad_weights[] = {1.0f, 0.0f};
  const Routing routing = route(config, logits, 1, {}, pool());
  EXPECT_FLOAT_EQ(routing.weights_TK[0], static_cast<float>(std::exp(-20.0) / kEpsilon));
  float grad_logits[2];
  route_backward(config, routing, grad_weights, nullptr, grad_logits, pool());
  EXPECT_FLOAT_EQ(grad_logits[0], static_cast<float>(std::exp(-20.0) / kEpsilon));  // s' = s (1 - s)
  EXPECT_EQ(grad_logits[1], 0.0f);
}

TEST(Router, Capacity) {
  RouterConfig config{.num_experts = 8, .top_k = 2};
  EXPECT_EQ(config.capacity(100, true), 100);
  config.capacity_factor = 1.0f;
  EXPECT_EQ(config.capacity(100, true), 25);
  EXPECT_EQ(config.capacity(101, true), 26);
  EXPECT_EQ(config.capacity(3, true), 4);  // min_capacity
  EXPECT_EQ(config.capacity(100, false), 100);
  config.eval_capacity_factor = 2.0f;
  EXPECT_EQ(config.capacity(100, false), 50);
  config.top_k = 1;
  config.capacity_factor = 1.1;
  EXPECT_EQ(config.capacity(80, true), 11);  // not 12: 1.1 is a little above 1.1 in double
  config.capacity_factor = 1e300;
  EXPECT_GE(config.capacity(80, true), 80);
  config.top_k = 3;
  config.capacity_factor = 1.2;
  EXPECT_EQ(config.capacity(120, true), 54);  // 1.2f * 45 is above 54, and 3.6f * 15 is not
}

template <typename Change>
std::string refusal(const Change& change) {
  RouterConfig config{.num_experts = 8, .top_k = 2};
  change(config);
  try {
    config.validate();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(Router, ValidateNamesFieldAndValue) {
  using Config = RouterConfig;
  EXPECT_EQ(refusal([](Config&) {}), "");
  EXPECT_EQ(refusal([](Config& c) { c.num_experts = 0; }), "[router] num_experts (0) is below 1");
  EXPECT_EQ(refusal([](Config& c) { c.top_k = 9; }), "[router] top_k (9) exceeds num_experts (8)");
  EXPECT_EQ(refusal([](Config& c) { c.top_k = 0; }), "[router] top_k (0) is below 1");
  EXPECT_EQ(refusal([](Config& c) { c.num_experts = c.top_k = 300; }), "[router] top_k (300) exceeds 256");
  EXPECT_EQ(refusal([](Config& c) { c.num_groups = 0; }), "[router] num_groups (0) is below 1");
  EXPECT_EQ(refusal([](Config& c) { c.num_groups = 3; }), "[router] num_groups (3) does not divide num_experts (8)");
  EXPECT_EQ(refusal([](Config& c) { c.top_k_groups = 0; }), "[router] top_k_groups (0) is below 1");
  EXPECT_EQ(refusal([](Config& c) { c.top_k_groups = 2; }), "[router] top_k_groups (2) exceeds num_groups (1)");
  EXPECT_EQ(refusal([](Config& c) { c.num_groups = 4, c.top_k = 3; }),
            "[router] top_k (3) exceeds the 2 experts in top_k_groups (1) groups");
  EXPECT_EQ(refusal([](Config& c) { c.num_groups = 8, c.top_k_groups = 2, c.group_score = GroupScore::kTopTwo; }),
            "[router] group_score (top2) needs two experts in a group, num_groups (8) leaves one");
  EXPECT_EQ(refusal([](Config& c) { c.routed_scaling = INFINITY; }), "[router] routed_scaling (inf) is not finite");
  EXPECT_EQ(refusal([](Config& c) { c.top_k = 1, c.choice_noise = ChoiceNoise::kSecondExpert; }),
            "[router] choice_noise (second_expert) needs top_k 2, not 1");
  EXPECT_EQ(refusal([](Config& c) { c.jitter = 1.0f; }), "[router] jitter (1) is not in [0, 1)");
  EXPECT_EQ(refusal([](Config& c) { c.capacity_factor = -1.5f; }),
            "[router] capacity_factor (-1.5) is not 0 or a positive number");
  EXPECT_EQ(refusal([](Config& c) { c.eval_capacity_factor = INFINITY; }),
            "[router] eval_capacity_factor (inf) is not 0 or a positive number");
  EXPECT_EQ(refusal([](Config& c) { c.min_capacity = -1; }), "[router] min_capacity (-1) is negative");
}

TEST(Router, ValidateExpertChoice) {
  const auto refused = [](auto change) {
    return refusal([&](RouterConfig& c) {
      c.chooser = Chooser::kExperts;
      c.capacity_factor = 1.0f;
      change(c);
    });
  };
  EXPECT_EQ(refused([](RouterConfig&) {}), "");
  EXPECT_EQ(refused([](RouterConfig& c) { c.capacity_factor = 0; }),
            "[router] chooser (experts) needs a capacity_factor above 0");
  EXPECT_EQ(refused([](RouterConfig& c) { c.num_groups = c.top_k_groups = 2; }),
            "[router] chooser (experts) does not go with num_groups (2)");
  EXPECT_EQ(refused([](RouterConfig& c) { c.choice_bias = true; }),
            "[router] chooser (experts) does not go with choice_bias (true)");
  EXPECT_EQ(refused([](RouterConfig& c) { c.choice_noise = ChoiceNoise::kRSample; }),
            "[router] chooser (experts) does not go with choice_noise (rsample)");
  EXPECT_EQ(refused([](RouterConfig& c) { c.num_experts = 257; }),
            "[router] chooser (experts) allows num_experts up to 256, not 257");
}

TEST(Router, NamesOfScoreFunctions) {
  EXPECT_EQ(score_function_from_name("sigmoid"), ScoreFunction::kSigmoid);
  EXPECT_EQ(score_function_name(ScoreFunction::kSoftmax), "softmax");
  EXPECT_THROW(score_function_from_name("tanh"), InvalidArgument);
}

}  // namespace
}  // namespace coterie
