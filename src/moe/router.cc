#include "moe/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "coterie/error.h"
#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "moe/capacity.h"
#include "moe/shared_capacity.h"
#include "moe/top_choices.h"

namespace coterie {
namespace {

constexpr float kLeastSum = 1e-20f;  // keeps a sum of zero scores from dividing by zero

void score_row(const RouterConfig& config, const float* logits_E, float* scores_E) {
  const int64_t E = config.num_experts;
  if (config.score_function == ScoreFunction::kSoftmax) {
    active_kernels().softmax_row(logits_E, E, scores_E);
    return;
  }
  if (config.score_function == ScoreFunction::kSparsemixer) {
    std::copy(logits_E, logits_E + E, scores_E);
    return;
  }
  for (int64_t e = 0; e < E; ++e) scores_E[e] = 1.0f / (1.0f + std::exp(-logits_E[e]));
}

// Each choice's share of the experts that come close to it, as kSparsemixer says. Its own part of the sum is exp(0).
void weigh_by_neighbours(const RouterConfig& config, const float* logits_E, const int32_t* ids_K, float* weights_K) {
  for (int64_t k = 0; k < config.top_k; ++k) {
    const float own = logits_E[ids_K[k]];
    float sum = 0.0f;
    for (int64_t e = 0; e < config.num_experts; ++e) {
      if (std::find(ids_K, ids_K + k, e) != ids_K + k) continue;
      const float distance = (own - logits_E[e]) / std::max(std::abs(logits_E[e]), own);
      if (!(distance > 2 * config.sparsemixer_epsilon)) sum += std::exp(logits_E[e] - own);
    }
    weights_K[k] = config.routed_scaling / sum;
  }
}

void refuse_training(const RouterConfig& config) {
  if (config.score_function != ScoreFunction::kSparsemixer) return;
  throw InvalidArgument("[router] score_function (sparsemixer) is not trained");
}

// Chooses a token's experts. Holds the buffers of one thread.
class TokenChoice {
 public:
  TokenChoice(const RouterConfig& config, const RouteOptions& options)
      : config_(config),
        options_(options),
        noise_(options.training ? config.choice_noise : ChoiceNoise::kNone),
        values_E_(static_cast<size_t>(config.num_experts)),
        noisy_E_(noise_ == ChoiceNoise::kNone ? 0 : static_cast<size_t>(config.num_experts)),
        group_values_G_(static_cast<size_t>(config.num_groups)),
        groups_(static_cast<size_t>(config.top_k_groups)),
        top_experts_(config.top_k),
        top_groups_(config.top_k_groups) {}

  void choose(int64_t t, const float* logits_E, const float* scores_E, int32_t* ids_K) {
    if (noise_ != ChoiceNoise::kNone) score_with_noise(t, logits_E);
    value_experts(noise_ == ChoiceNoise::kRSample ? noisy_E_.data() : scores_E);
    choose_groups();
    choose_experts(ids_K);
    if (noise_ == ChoiceNoise::kSecondExpert) choose_second(ids_K);
  }

 private:
  void score_with_noise(int64_t t, const float* logits_E) {
    gumbel_noise(options_.key, t, config_.num_experts, noisy_E_.data());
    for (int64_t e = 0; e < config_.num_experts; ++e) noisy_E_[e] += logits_E[e];
    score_row(config_, noisy_E_.data(), noisy_E_.data());
  }

  void value_experts(const float* scores_E) {
    const float* bias_E = options_.choice_bias_E;
    for (int64_t e = 0; e < config_.num_experts; ++e) {
      values_E_[e] = ordered(bias_E ? scores_E[e] + bias_E[e] : scores_E[e]);
    }
  }

  void choose_groups() {
    if (config_.num_groups == 1) return;
    for (int64_t g = 0; g < config_.num_groups; ++g) group_values_G_[g] = ordered(value_of_group(g));
    top_groups_.start(groups_.data());
    top_groups_.offer(group_values_G_.data(), 0, config_.num_groups);
    std::sort(groups_.begin(), groups_.end());  // so that of equal experts the lower one is met first
  }

  float value_of_group(int64_t g) const {
    const int64_t size = config_.experts_per_group();
    float best = -std::numeric_limits<float>::infinity(), second = best;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      second = std::max(second, std::min(best, values_E_[e]));
      best = std::max(best, values_E_[e]);
    }
    return config_.group_score == GroupScore::kMax ? best : best + second;
  }

  void choose_experts(int32_t* ids_K) {
    const int64_t size = config_.experts_per_group();
    top_experts_.start(ids_K);
    for (const int32_t g : groups_) top_experts_.offer(values_E_.data(), g * size, (g + 1) * size);
  }

  // The best by noise that is not the first.
  void choose_second(int32_t* ids_2) {
    int32_t noisy_2[2];
    value_experts(noisy_E_.data());
    choose_experts(noisy_2);
    ids_2[1] = noisy_2[0] == ids_2[0] ? noisy_2[1] : noisy_2[0];
  }

  const RouterConfig& config_;
  const RouteOptions& options_;
  ChoiceNoise noise_;
  std::vector<float> values_E_, noisy_E_, group_values_G_;
  std::vector<int32_t> groups_;  // without groups: one, of all experts
  TopChoices top_experts_, top_groups_;
};

void weigh_choices(const RouterConfig& config, int64_t K, const float* scores_E, const int32_t* ids_K,
                   const uint8_t* kept_K, float* weights_K) {
  if (config.score_function == ScoreFunction::kSparsemixer) {
    return weigh_by_neighbours(config, scores_E, ids_K, weights_K);
  }
  float chosen = 0.0f, kept = 0.0f;
  for (int64_t k = 0; k < K; ++k) {
    weights_K[k] = scores_E[ids_K[k]];
    chosen += weights_K[k];
    if (kept_K[k]) kept += weights_K[k];
  }
  float divisor = 1.0f;
  if (config.normalize) {
    divisor = config.sums_kept() ? std::max(kept, std::numeric_limits<float>::epsilon()) : chosen + kLeastSum;
  }
  for (int64_t k = 0; k < K; ++k) weights_K[k] = kept_K[k] ? weights_K[k] / divisor * config.routed_scaling : 0.0f;
}

// Gradient of the loss with respect to the scores of one token, added to grad_scores_E.
void weights_backward(const RouterConfig& config, int64_t K, const float* scores_E, const int32_t* ids_K,
                      const uint8_t* kept_K, const float* grad_weights_K, double* grad_scores_E) {
  double sum = 0.0, weighted = 0.0;
  for (int64_t k = 0; k < K; ++k) {
    if (kept_K[k] || !config.sums_kept()) sum += scores_E[ids_K[k]];
    if (kept_K[k]) weighted += static_cast<double>(grad_weights_K[k]) * scores_E[ids_K[k]];
  }
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
  const bool constant = config.sums_kept() && sum < kEpsilon;  // then the divisor is the epsilon itself
  const double divisor = constant ? kEpsilon : sum + (config.sums_kept() ? 0.0 : kLeastSum);
  for (int64_t k = 0; k < K; ++k) {
    double grad = kept_K[k] ? grad_weights_K[k] : 0.0;
    if (config.normalize) {
      // w_k = s_k / sum: with the sum over the chosen, a dropped choice still has its part in it.
      const bool in_sum = !constant && (kept_K[k] || !config.sums_kept());
      grad = grad / divisor - (in_sum ? weighted / (divisor * divisor) : 0.0);
    }
    grad_scores_E[ids_K[k]] += grad * config.routed_scaling;
  }
}

void scores_backward(const RouterConfig& config, const float* scores_E, const double* grad_scores_E,
                     float* grad_logits_E) {
  const int64_t E = config.num_experts;
  double dot = 0.0;
  if (config.score_function == ScoreFunction::kSoftmax) {
    for (int64_t e = 0; e < E; ++e) dot += grad_scores_E[e] * scores_E[e];
    for (int64_t e = 0; e < E; ++e) grad_logits_E[e] = static_cast<float>(scores_E[e] * (grad_scores_E[e] - dot));
    return;
  }
  for (int64_t e = 0; e < E; ++e) {
    grad_logits_E[e] = static_cast<float>(grad_scores_E[e] * scores_E[e] * (1.0 - scores_E[e]));
  }
}

Routing empty_routing(int64_t T, int64_t E, int64_t K) {
  Routing routing;
  routing.num_tokens = T;
  routing.num_experts = E;
  routing.top_k = K;
  routing.expert_ids_TK.resize(static_cast<size_t>(T * K));
  routing.weights_TK.resize(static_cast<size_t>(T * K));
  routing.kept_TK.resize(static_cast<size_t>(T * K));
  routing.tokens_per_expert_E.resize(static_cast<size_t>(E));
  routing.scores_TE.resize(static_cast<size_t>(T * E));
  return routing;
}

// Which choices are kept.
void give_places(const RouterConfig& config, const RouteOptions& options, bool experts_choose, Routing& routing,
                 ThreadPool& pool) {
  const double factor = options.training ? config.capacity_factor : config.eval_capacity_factor;
  const int64_t capacity = config.capacity(routing.num_tokens, options.training);
  if (options.world && factor > 0.0f) {
    share_places(config, options, experts_choose, routing, pool);
  } else if (experts_choose) {
    let_experts_choose(config, capacity, options.key, routing, pool);
  } else {
    drop_over_capacity(config, capacity, options.key, routing, pool);
  }
}

}  // namespace

Routing route(const RouterConfig& config, const float* logits_TE, int64_t num_tokens, const RouteOptions& options,
              ThreadPool& pool) {
  if (options.training) refuse_training(config);
  const bool experts_choose = options.training && config.chooser == Chooser::kExperts;
  const int64_t T = num_tokens, E = config.num_experts, K = experts_choose ? E : config.top_k;
  COTERIE_CHECK(K >= 1 && K <= E && E % config.num_groups == 0, "the configuration was not validated");
  Routing routing = empty_routing(T, E, K);
  const int64_t cost = 8 * E;  // a score costs about as much as 8 elements of simple arithmetic
  parallel_row_ranges(T, cost, pool, [&](int64_t first, int64_t last) {
    TokenChoice choice(config, options);
    for (int64_t t = first; t < last; ++t) {
      float* scores_E = routing.scores_TE.data() + t * E;
      int32_t* ids_K = routing.expert_ids_TK.data() + t * K;
      score_row(config, logits_TE + t * E, scores_E);
      if (experts_choose) {
        std::iota(ids_K, ids_K + K, 0);
      } else {
        choice.choose(t, logits_TE + t * E, scores_E, ids_K);
      }
    }
  });
  give_places(config, options, experts_choose, routing, pool);
  parallel_rows(T, 2 * K, pool, [&](int64_t t) {
    weigh_choices(config, K, routing.scores_TE.data() + t * E, routing.expert_ids_TK.data() + t * K,
                  routing.kept_TK.data() + t * K, routing.weights_TK.data() + t * K);
  });
  return routing;
}

void route_backward(const RouterConfig& config, const Routing& routing, const float* grad_weights_TK,
                    const float* grad_scores_TE, float* grad_logits_TE, ThreadPool& pool) {
  refuse_training(config);
  const int64_t E = routing.num_experts, K = routing.top_k;
  parallel_row_ranges(routing.num_tokens, 4 * E, pool, [&](int64_t first, int64_t last) {
    std::vector<double> grad_scores_E(static_cast<size_t>(E));
    for (int64_t t = first; t < last; ++t) {
      const float* scores_E = routing.scores_TE.data() + t * E;
      for (int64_t e = 0; e < E; ++e) grad_scores_E[e] = grad_scores_TE ? grad_scores_TE[t * E + e] : 0.0;
      weights_backward(config, K, scores_E, routing.expert_ids_TK.data() + t * K, routing.kept_TK.data() + t * K,
                       grad_weights_TK + t * K, grad_scores_E.data());
      scores_backward(config, scores_E, grad_scores_E.data(), grad_logits_TE + t * E);
    }
  });
}

}  // namespace coterie
