#include <algorithm>
#include <cmath>
#include <string>

#include "coterie/error.h"
#include "moe/combine.h"
#include "moe/router.h"

namespace coterie {
namespace {

constexpr double kMostPlaces = 0x1p62;  // that still fit the type of a capacity

std::string text(int64_t value) { return std::to_string(value); }

std::string text(double value) {
  std::string digits = std::to_string(value);
  while (digits.back() == '0') digits.pop_back();
  if (digits.back() == '.') digits.pop_back();
  return digits;
}

// Throws "[router] field (value) what" when the condition doesn't hold.
void require(bool condition, const char* field, const std::string& value, const std::string& what) {
  if (!condition) throw InvalidArgument(std::string("[router] ") + field + " (" + value + ") " + what);
}

void require_factor(const char* field, double factor) {
  require(factor >= 0.0 && std::isfinite(factor), field, text(factor), "is not 0 or a positive number");
}

std::string name_of(ChoiceNoise noise) { return noise == ChoiceNoise::kRSample ? "rsample" : "second_expert"; }

void validate_groups(const RouterConfig& c) {
  require(c.num_groups >= 1, "num_groups", text(c.num_groups), "is below 1");
  require(c.num_experts % c.num_groups == 0, "num_groups", text(c.num_groups),
          "does not divide num_experts (" + text(c.num_experts) + ")");
  require(c.top_k_groups >= 1, "top_k_groups", text(c.top_k_groups), "is below 1");
  require(c.top_k_groups <= c.num_groups, "top_k_groups", text(c.top_k_groups),
          "exceeds num_groups (" + text(c.num_groups) + ")");
  const int64_t within_reach = c.top_k_groups * c.experts_per_group();
  require(c.top_k <= within_reach, "top_k", text(c.top_k),
          "exceeds the " + text(within_reach) + " experts in top_k_groups (" + text(c.top_k_groups) + ") groups");
  require(c.group_score == GroupScore::kMax || c.num_groups == 1 || c.experts_per_group() >= 2, "group_score", "top2",
          "needs two experts in a group, num_groups (" + text(c.num_groups) + ") leaves one");
}

void validate_expert_choice(const RouterConfig& c) {
  if (c.chooser == Chooser::kTokens) return;
  require(c.capacity_factor > 0, "chooser", "experts", "needs a capacity_factor above 0");
  require(c.num_groups == 1, "chooser", "experts", "does not go with num_groups (" + text(c.num_groups) + ")");
  require(!c.choice_bias, "chooser", "experts", "does not go with choice_bias (true)");
  require(c.choice_noise == ChoiceNoise::kNone, "chooser", "experts",
          "does not go with choice_noise (" + name_of(c.choice_noise) + ")");
  require(c.num_experts <= kMostChoices, "chooser", "experts",
          "allows num_experts up to " + text(kMostChoices) + ", not " + text(c.num_experts));
}

void validate_sparsemixer(const RouterConfig& c) {
  if (c.score_function != ScoreFunction::kSparsemixer) return;
  require(c.sparsemixer_epsilon >= 0 && std::isfinite(c.sparsemixer_epsilon), "sparsemixer_epsilon",
          text(double{c.sparsemixer_epsilon}), "is not 0 or a positive number");
  require(!c.normalize, "score_function", "sparsemixer", "does not go with normalize (true)");
  require(!c.choice_bias, "score_function", "sparsemixer", "does not go with choice_bias (true)");
  require(c.eval_capacity_factor == 0, "score_function", "sparsemixer",
          "does not go with eval_capacity_factor (" + text(c.eval_capacity_factor) + ")");
}

}  // namespace

int64_t RouterConfig::capacity(int64_t num_tokens, bool training) const {
  const double factor = training ? capacity_factor : eval_capacity_factor;
  if (factor == 0) return num_tokens;
  // In fp32, rounded as DeepSpeed does: there 1.1f * 10 is 11, in double a little more, and its ceiling 12.
  const auto even = static_cast<float>(static_cast<double>(num_tokens) / static_cast<double>(num_experts));
  const float places = even * static_cast<float>(std::min(factor * static_cast<double>(top_k), kMostPlaces));
  return std::max(static_cast<int64_t>(std::ceil(std::min<double>(places, kMostPlaces))), min_capacity);
}

void RouterConfig::validate() const {
  require(num_experts >= 1, "num_experts", text(num_experts), "is below 1");
  require(top_k >= 1, "top_k", text(top_k), "is below 1");
  require(top_k <= num_experts, "top_k", text(top_k), "exceeds num_experts (" + text(num_experts) + ")");
  require(top_k <= kMostChoices, "top_k", text(top_k), "exceeds " + text(kMostChoices));
  validate_groups(*this);
  require(std::isfinite(routed_scaling), "routed_scaling", text(double{routed_scaling}), "is not finite");
  require(choice_noise != ChoiceNoise::kSecondExpert || top_k == 2, "choice_noise", "second_expert",
          "needs top_k 2, not " + text(top_k));
  require(jitter >= 0.0f && jitter < 1.0f, "jitter", text(double{jitter}), "is not in [0, 1)");
  require_factor("capacity_factor", capacity_factor);
  require_factor("eval_capacity_factor", eval_capacity_factor);
  require(min_capacity >= 0, "min_capacity", text(min_capacity), "is negative");
  validate_expert_choice(*this);
  validate_sparsemixer(*this);
}

ScoreFunction score_function_from_name(std::string_view name) {
  if (name == "softmax") return ScoreFunction::kSoftmax;
  if (name == "sigmoid") return ScoreFunction::kSigmoid;
  if (name == "sparsemixer") return ScoreFunction::kSparsemixer;
  throw InvalidArgument("score_function: '" + std::string(name) + "' is not one of softmax, sigmoid, sparsemixer");
}

std::string_view score_function_name(ScoreFunction function) {
  if (function == ScoreFunction::kSparsemixer) return "sparsemixer";
  return function == ScoreFunction::kSoftmax ? "softmax" : "sigmoid";
}

}  // namespace coterie
