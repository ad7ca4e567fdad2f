// The router: logits -> choices -> Routing. One implementation for training and serving, so that a
// model routes the same where it is trained and where it is served.
// Legend: T tokens, E experts, K choices per token (top_k), G groups of experts.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/thread_pool.h"
#include "moe/router_random.h"

namespace coterie {

class ProcessGroup;

// kSparsemixer (Liu et al. 2024, "GRIN"; outside of training): the scores are the logits, and a choice weighs its share
// of a softmax over those experts, without earlier choices, whose logits come close to its own: (own - other) /
// max(|other|, own) is at most 2 sparsemixer_epsilon.
enum class ScoreFunction { kSoftmax, kSigmoid, kSparsemixer };

// Who chooses while training. kTokens: each token its top_k experts. kExperts: each expert the
// capacity() tokens that score it highest (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice
// Routing"). That looks at later tokens, so outside of training tokens choose even then.
enum class Chooser { kTokens, kExperts };

// What a group of experts is worth: its best score (DeepSeek-V2, section 2.2.2), or the sum of its two
// best (DeepSeek-V3, section 2.1.2).
enum class GroupScore { kMax, kTopTwo };

// Over which choices a normalised weight is a share: over all K (plus 1e-20), or over those that were
// not dropped (at least the fp32 epsilon: GShard, algorithm 1, as DeepSpeed has it). Where experts
// choose, the choices are the kept ones, and the sum is always over them.
enum class NormalizeOver { kChosen, kKept };

// Gumbel noise on the logits while training. It decides the choice alone; weights come from clean
// scores. kRSample: for every choice. kSecondExpert: for the second of two (GShard, section 2.2).
enum class ChoiceNoise { kNone, kRSample, kSecondExpert };

// Which of an expert's claims over capacity are dropped. kRandom and kPosition: places go choice by
// choice (all first choices before any second), in each to tokens in a random order (DeepSpeed-MoE's
// random token selection) or in theirs. kProbability: an expert keeps the highest scores, of equal
// ones the lower token.
enum class DropPolicy { kRandom, kPosition, kProbability };

struct RouterConfig {
  int64_t num_experts = 0;
  int64_t top_k = 1;
  ScoreFunction score_function = ScoreFunction::kSoftmax;
  float sparsemixer_epsilon = 0.01f;
  bool logit_bias = false;  // the layer has a bias per expert, added to the logits
  Chooser chooser = Chooser::kTokens;
  int64_t num_groups = 1;    // of num_experts / num_groups experts each, in order
  int64_t top_k_groups = 1;  // a token chooses within so many groups, the best
  GroupScore group_score = GroupScore::kMax;
  bool choice_bias = false;  // the layer has a bias per expert, added to the scores for the choice alone
  bool normalize = false;    // a token's weights divided by their sum
  NormalizeOver normalize_over = NormalizeOver::kChosen;
  float routed_scaling = 1.0f;  // weights multiplied by this, last of all
  ChoiceNoise choice_noise = ChoiceNoise::kNone;
  float jitter = 0.0f;                // epsilon of jitter_factors() on the router's input while training; 0: none
  double capacity_factor = 0.0;       // 0: dropless. Else an expert takes at most capacity() tokens
  double eval_capacity_factor = 0.0;  // the same outside of training
  int64_t min_capacity = 4;           // floor of capacity() when tokens are dropped
  DropPolicy drop_policy = DropPolicy::kRandom;

  int64_t experts_per_group() const { return num_experts / num_groups; }
  bool sums_kept() const { return normalize_over == NormalizeOver::kKept || chooser == Chooser::kExperts; }

  // ceil(capacity factor * T * top_k / num_experts), at least min_capacity; T when dropless.
  int64_t capacity(int64_t num_tokens, bool training) const;
  void validate() const;  // InvalidArgument: "[router] top_k (9) exceeds num_experts (8)"
};

ScoreFunction score_function_from_name(std::string_view name);  // "softmax", "sigmoid", "sparsemixer"
std::string_view score_function_name(ScoreFunction function);

// Which experts each token goes to, and with which weight. Choices run from the best down; equal ones
// go to the lower expert id. A choice that was dropped (over capacity) keeps its expert id in
// expert_ids_TK, has weight 0 and is not counted in tokens_per_expert_E. Where experts chose, K is E,
// choice k is expert k, and kept are those that took the token.
struct Routing {
  int64_t num_tokens = 0;
  int64_t num_experts = 0;
  int64_t top_k = 0;
  std::vector<int32_t> expert_ids_TK;
  std::vector<float> weights_TK;
  std::vector<uint8_t> kept_TK;              // 1, or 0 for a dropped choice
  std::vector<int64_t> tokens_per_expert_E;  // kept choices
  std::vector<float> scores_TE;              // as ScoreFunction says; kept for the backward pass
};

// What route() is told beside the logits.
struct RouteOptions {
  bool training = false;  // noise, the experts' choice and capacity_factor apply; else eval_capacity_factor
  RandomKey key = {};     // of every random choice
  const float* choice_bias_E = nullptr;  // null: zeros
  // Whose tokens share the places of experts with limited capacity; null: these tokens alone have them. Collective,
  // where capacity is limited.
  ProcessGroup* world = nullptr;
};

// Logits that are no numbers still give every token K different experts. The result doesn't depend on
// the pool.
Routing route(const RouterConfig& config, const float* logits_TE, int64_t num_tokens, const RouteOptions& options,
              ThreadPool& pool);

// Gradient of sum(weights_TK * grad_weights_TK) + sum(scores_TE * grad_scores_TE) with respect to the
// logits, K = routing.top_k. Dropped choices have no gradient through their own (zero) weight.
// grad_scores_TE may be null. Not of kSparsemixer.
void route_backward(const RouterConfig& config, const Routing& routing, const float* grad_weights_TK,
                    const float* grad_scores_TE, float* grad_logits_TE, ThreadPool& pool);

}  // namespace coterie
