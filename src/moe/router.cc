#include "moe/router.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/check.h"
#include "coterie/error.h"
#include "kernels/kernel_table.h"

namespace coterie {
namespace {

constexpr float kLeastSum = 1e-20f;  // keeps a sum of zero scores from dividing by zero

std::string value_text(double value) {
  std::string text = std::to_string(value);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text;
}

void score_row(const RouterConfig& config, const float* logits_E, float* scores_E) {
  const int64_t E = config.num_experts;
  if (config.score_function == ScoreFunction::kSoftmax) {
    active_kernels().softmax_row(logits_E, E, scores_E);
    return;
  }
  for (int64_t e = 0; e < E; ++e) scores_E[e] = 1.0f / (1.0f + std::exp(-logits_E[e]));
}

// Any number passes a NaN, and a NaN passes nobody: broken logits still give K different experts.
bool passes(float score, float other) { return score > other || (std::isnan(other) && !std::isnan(score)); }

// The K highest scores, highest first; of equal ones the lower id first. K is small: a sorted list
// with insertion from below.
void choose_experts(const float* scores_E, int64_t E, int64_t K, int32_t* ids_K) {
  int64_t count = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (count == K && !passes(scores_E[e], scores_E[ids_K[K - 1]])) continue;
    int64_t place = count < K ? count++ : K - 1;
    for (; place > 0 && passes(scores_E[e], scores_E[ids_K[place - 1]]); --place) ids_K[place] = ids_K[place - 1];
    ids_K[place] = static_cast<int32_t>(e);
  }
}

void weigh_choices(const RouterConfig& config, const float* scores_E, const int32_t* ids_K, float* weights_K) {
  float sum = 0.0f;
  for (int64_t k = 0; k < config.top_k; ++k) {
    weights_K[k] = scores_E[ids_K[k]];
    sum += weights_K[k];
  }
  const float divisor = config.normalize ? sum + kLeastSum : 1.0f;
  for (int64_t k = 0; k < config.top_k; ++k) weights_K[k] = weights_K[k] / divisor * config.routed_scaling;
}

// Places are claimed choice by choice, each in the order of priority.
void assign_places(Routing& routing, int64_t capacity, const int32_t* priority_T) {
  const int64_t T = routing.num_tokens, K = routing.top_k;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t i = 0; i < T; ++i) {
      const int64_t choice = (priority_T ? priority_T[i] : i) * K + k;
      int64_t& taken = routing.tokens_per_expert_E[routing.expert_ids_TK[choice]];
      if (taken < capacity) {
        ++taken;
      } else {
        routing.kept_TK[choice] = 0;
        routing.weights_TK[choice] = 0.0f;
      }
    }
  }
}

// Gradient of the loss with respect to the scores of one token, added to grad_scores_E.
void weights_backward(const RouterConfig& config, const float* scores_E, const int32_t* ids_K, const uint8_t* kept_K,
                      const float* grad_weights_K, double* grad_scores_E) {
  const int64_t K = config.top_k;
  double sum = kLeastSum, weighted = 0.0;
  for (int64_t k = 0; k < K; ++k) {
    sum += scores_E[ids_K[k]];
    if (kept_K[k]) weighted += static_cast<double>(grad_weights_K[k]) * scores_E[ids_K[k]];
  }
  for (int64_t k = 0; k < K; ++k) {
    const double own = kept_K[k] ? grad_weights_K[k] : 0.0;
    // w_k = s_k / sum: a dropped choice still has its part in the sum.
    const double grad = config.normalize ? own / sum - weighted / (sum * sum) : own;
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

}  // namespace

int64_t RouterConfig::capacity(int64_t num_tokens) const {
  if (capacity_factor == 0.0f) return num_tokens;
  // In fp32, where 1.1f * 10 is 11: in double it is a little more, and its ceiling 12.
  const float even = static_cast<float>(num_tokens * top_k) / static_cast<float>(num_experts);
  return std::max(static_cast<int64_t>(std::ceil(capacity_factor * even)), min_capacity);
}

void RouterConfig::validate() const {
  if (num_experts < 1) throw InvalidArgument("[router] num_experts (" + std::to_string(num_experts) + ") is below 1");
  if (top_k < 1) throw InvalidArgument("[router] top_k (" + std::to_string(top_k) + ") is below 1");
  if (top_k > num_experts) {
    throw InvalidArgument("[router] top_k (" + std::to_string(top_k) + ") exceeds num_experts (" +
                          std::to_string(num_experts) + ")");
  }
  if (!(capacity_factor >= 0.0f) || std::isinf(capacity_factor)) {
    throw InvalidArgument("[router] capacity_factor (" + value_text(capacity_factor) +
                          ") is not 0 or a positive number");
  }
  if (min_capacity < 0)
    throw InvalidArgument("[router] min_capacity (" + std::to_string(min_capacity) + ") is negative");
  if (!std::isfinite(routed_scaling)) {
    throw InvalidArgument("[router] routed_scaling (" + value_text(routed_scaling) + ") is not finite");
  }
}

ScoreFunction score_function_from_name(std::string_view name) {
  if (name == "softmax") return ScoreFunction::kSoftmax;
  if (name == "sigmoid") return ScoreFunction::kSigmoid;
  throw InvalidArgument("score_function: '" + std::string(name) + "' is not one of softmax, sigmoid");
}

std::string_view score_function_name(ScoreFunction function) {
  return function == ScoreFunction::kSoftmax ? "softmax" : "sigmoid";
}

Routing route(const RouterConfig& config, const float* logits_TE, int64_t num_tokens, const int32_t* priority_T) {
  const int64_t T = num_tokens, E = config.num_experts, K = config.top_k;
  COTERIE_CHECK(K >= 1 && K <= E, "the configuration was not validated");
  Routing routing;
  routing.num_tokens = T;
  routing.num_experts = E;
  routing.top_k = K;
  routing.expert_ids_TK.resize(static_cast<size_t>(T * K));
  routing.weights_TK.resize(static_cast<size_t>(T * K));
  routing.kept_TK.assign(static_cast<size_t>(T * K), 1);
  routing.tokens_per_expert_E.assign(static_cast<size_t>(E), 0);
  routing.scores_TE.resize(static_cast<size_t>(T * E));
  for (int64_t t = 0; t < T; ++t) {
    float* scores_E = routing.scores_TE.data() + t * E;
    int32_t* ids_K = routing.expert_ids_TK.data() + t * K;
    score_row(config, logits_TE + t * E, scores_E);
    choose_experts(scores_E, E, K, ids_K);
    weigh_choices(config, scores_E, ids_K, routing.weights_TK.data() + t * K);
  }
  assign_places(routing, config.capacity(T), priority_T);
  return routing;
}

void route_backward(const RouterConfig& config, const Routing& routing, const float* grad_weights_TK,
                    const float* grad_scores_TE, float* grad_logits_TE) {
  const int64_t E = config.num_experts, K = config.top_k;
  std::vector<double> grad_scores_E(static_cast<size_t>(E));
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    const float* scores_E = routing.scores_TE.data() + t * E;
    for (int64_t e = 0; e < E; ++e) grad_scores_E[e] = grad_scores_TE ? grad_scores_TE[t * E + e] : 0.0;
    weights_backward(config, scores_E, routing.expert_ids_TK.data() + t * K, routing.kept_TK.data() + t * K,
                     grad_weights_TK + t * K, grad_scores_E.data());
    scores_backward(config, scores_E, grad_scores_E.data(), grad_logits_TE + t * E);
  }
}

}  // namespace coterie
