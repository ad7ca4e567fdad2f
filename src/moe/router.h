// The router: logits -> top-k -> Routing. One implementation for training and serving, so that a
// model routes the same where it is trained and where it is served.
// Legend: T tokens, E experts, K experts per token (top_k).
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace coterie {

enum class ScoreFunction { kSoftmax, kSigmoid };

struct RouterConfig {
  int64_t num_experts = 0;
  int64_t top_k = 1;
  ScoreFunction score_function = ScoreFunction::kSoftmax;
  bool normalize = false;        // weights of the chosen K divided by their sum (plus 1e-20)
  float routed_scaling = 1.0f;   // weights multiplied by this, last of all
  float capacity_factor = 0.0f;  // 0: dropless. Else an expert takes at most capacity() tokens
  int64_t min_capacity = 4;      // floor of capacity() when tokens are dropped

  // ceil(capacity_factor * T * top_k / num_experts), at least min_capacity; T when dropless.
  int64_t capacity(int64_t num_tokens) const;
  void validate() const;  // InvalidArgument: "[router] top_k (9) exceeds num_experts (8)"
};

ScoreFunction score_function_from_name(std::string_view name);  // "softmax", "sigmoid"
std::string_view score_function_name(ScoreFunction function);

// Which experts each token goes to, and with which weight. Choices run from the highest score down;
// equal scores go to the lower expert id. A choice that was dropped (over capacity) keeps its expert
// id in expert_ids_TK, has weight 0 and is not counted in tokens_per_expert_E.
struct Routing {
  int64_t num_tokens = 0;
  int64_t num_experts = 0;
  int64_t top_k = 0;
  std::vector<int32_t> expert_ids_TK;
  std::vector<float> weights_TK;
  std::vector<uint8_t> kept_TK;              // 1, or 0 for a dropped choice
  std::vector<int64_t> tokens_per_expert_E;  // kept choices
  std::vector<float> scores_TE;              // softmax or sigmoid of the logits; kept for the backward pass
};

// With a capacity, tokens claim places choice by choice (all first choices before any second), each
// choice in the order of `priority` (a permutation of the T tokens; null: by position). Random token
// selection passes a random permutation (DeepSpeed-MoE's `use_rts`). Weights are computed before
// dropping, so a normalised weight stays what it was.
Routing route(const RouterConfig& config, const float* logits_TE, int64_t num_tokens,
              const int32_t* priority_T = nullptr);

// Gradient of sum(weights_TK * grad_weights_TK) + sum(scores_TE * grad_scores_TE) with respect to the
// logits. Dropped choices have no gradient through their own (zero) weight. grad_scores_TE may be null.
void route_backward(const RouterConfig& config, const Routing& routing, const float* grad_weights_TK,
                    const float* grad_scores_TE, float* grad_logits_TE);

}  // namespace coterie
