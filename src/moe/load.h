// How evenly a layer's experts are used, counted over any number of routings. Costs one increment per
// choice. Legend as in moe/router.h.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "moe/router.h"

namespace coterie {

struct LoadStats {
  std::vector<int64_t> tokens_per_expert_E;  // kept choices
  double balance = 0;  // kept choices of the fullest expert over the mean; 1 is even, 0 without any
  double dropped = 0;  // share of the choices that found no place; where experts chose, 0
  // Of all choices, before dropping:
  double entropy = 0;        // of the shares, nats; log(E) is even
  double max_violation = 0;  // fullest over mean, minus 1 (MaxVio of Wang et al. 2024, section 4.1)
  int64_t dead_experts = 0;  // without any
};

class LoadCounter {
 public:
  explicit LoadCounter(const RouterConfig& config);

  void add(const Routing& routing);  // of training: where experts choose, the choices are the kept ones
  LoadStats stats() const;

  const std::vector<int64_t>& chosen_E() const { return chosen_E_; }  // before dropping
  // The counts themselves, for sums over ranks.
  std::array<std::span<int64_t>, 2> counts() { return {chosen_E_, kept_E_}; }
  int64_t num_chosen() const;
  int64_t num_kept() const;

 private:
  bool experts_choose_;
  std::vector<int64_t> chosen_E_;
  std::vector<int64_t> kept_E_;
};

// bias += rate * sign(mean load - load) for every expert (DeepSeek-V3, section 2.1.2, "Auxiliary-loss-free
// load balancing"; Wang et al. 2024, algorithm 1).
void update_choice_bias(const std::vector<int64_t>& load_E, float rate, float* bias_E);

}  // namespace coterie
