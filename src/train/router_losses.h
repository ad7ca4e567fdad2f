// What training adds to the loss for the router's sake. Legend: T tokens, E experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moe/router.h"

namespace coterie {

// Which choices count as load. kAll: Switch Transformer, for any top-k. kFirst: GShard's top-2.
enum class BalanceChoices { kAll, kFirst };

BalanceChoices balance_choices_from_name(const std::string& name);  // "all", "first"

// Adds the choices of each expert, before any is dropped.
void count_choices(const Routing& routing, BalanceChoices choices, std::vector<int64_t>& count_E);

// E * sum_e f_e p_e (Switch Transformer eq. 4): f_e the share of the counted choices that went to expert
// e (not differentiated), p_e the mean softmax probability of e. 1 when both are uniform. With counts of
// more tokens than those of the logits, the balance is that of the larger batch (Qiu et al. 2025,
// "Demons in the Detail", section 3).
at::Tensor balance_loss(const at::Tensor& logits_TE, const std::vector<int64_t>& count_E);

// The mean square of logsumexp of the logits (ST-MoE eq. 5).
at::Tensor z_loss(const at::Tensor& logits_TE);

}  // namespace coterie
