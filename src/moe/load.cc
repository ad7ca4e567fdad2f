#include "moe/load.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace coterie {
namespace {

int64_t sum(const std::vector<int64_t>& count_E) { return std::accumulate(count_E.begin(), count_E.end(), int64_t{0}); }

// The fullest expert's load over the mean; 0 without any.
double peak(const std::vector<int64_t>& count_E) {
  const int64_t total = sum(count_E);
  if (total == 0) return 0;
  const double mean = static_cast<double>(total) / static_cast<double>(count_E.size());
  return static_cast<double>(*std::max_element(count_E.begin(), count_E.end())) / mean;
}

double entropy(const std::vector<int64_t>& count_E) {
  const auto total = static_cast<double>(sum(count_E));
  double result = 0;
  for (const int64_t count : count_E) {
    if (count == 0) continue;
    const double share = static_cast<double>(count) / total;
    result -= share * std::log(share);
  }
  return result;
}

}  // namespace

LoadCounter::LoadCounter(const RouterConfig& config)
    : experts_choose_(config.chooser == Chooser::kExperts),
      chosen_E_(static_cast<size_t>(config.num_experts)),
      kept_E_(static_cast<size_t>(config.num_experts)) {}

void LoadCounter::add(const Routing& routing) {
  for (size_t e = 0; e < kept_E_.size(); ++e) kept_E_[e] += routing.tokens_per_expert_E[e];
  if (experts_choose_) {
    chosen_E_ = kept_E_;
  } else {
    for (const int32_t e : routing.expert_ids_TK) ++chosen_E_[e];
  }
}

int64_t LoadCounter::num_chosen() const { return sum(chosen_E_); }
int64_t LoadCounter::num_kept() const { return sum(kept_E_); }

LoadStats LoadCounter::stats() const {
  LoadStats stats;
  stats.tokens_per_expert_E = kept_E_;
  stats.balance = peak(kept_E_);
  if (num_chosen() == 0) return stats;
  stats.dropped = 1.0 - static_cast<double>(num_kept()) / static_cast<double>(num_chosen());
  stats.entropy = entropy(chosen_E_);
  stats.max_violation = peak(chosen_E_) - 1.0;
  stats.dead_experts = std::count(chosen_E_.begin(), chosen_E_.end(), 0);
  return stats;
}

void update_choice_bias(const std::vector<int64_t>& load_E, float rate, float* bias_E) {
  const int64_t total = sum(load_E), E = static_cast<int64_t>(load_E.size());
  for (int64_t e = 0; e < E; ++e) {
    const int64_t excess = load_E[e] * E - total;  // the sign of load - mean, in whole numbers
    if (excess != 0) bias_E[e] += excess < 0 ? rate : -rate;
  }
}

}  // namespace coterie
