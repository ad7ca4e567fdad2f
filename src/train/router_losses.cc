#include "train/router_losses.h"

#include <ATen/ATen.h>

#include <numeric>

#include "coterie/error.h"

namespace coterie {

BalanceChoices balance_choices_from_name(const std::string& name) {
  if (name == "all") return BalanceChoices::kAll;
  if (name == "first") return BalanceChoices::kFirst;
  throw InvalidArgument("balance_loss_choices: '" + name + "' is neither all nor first");
}

void count_choices(const Routing& routing, BalanceChoices choices, std::vector<int64_t>& count_E) {
  count_E.resize(static_cast<size_t>(routing.num_experts));
  const int64_t step = choices == BalanceChoices::kFirst ? routing.top_k : 1;
  const auto end = static_cast<int64_t>(routing.expert_ids_TK.size());
  for (int64_t choice = 0; choice < end; choice += step) ++count_E[routing.expert_ids_TK[choice]];
}

at::Tensor balance_loss(const at::Tensor& logits_TE, const std::vector<int64_t>& count_E) {
  const std::vector<float> load_E(count_E.begin(), count_E.end());
  const auto E = static_cast<int64_t>(load_E.size());
  const at::Tensor load = at::from_blob(const_cast<float*>(load_E.data()), {E}, at::kFloat).clone();
  const auto total = static_cast<double>(std::accumulate(count_E.begin(), count_E.end(), int64_t{0}));
  return (at::softmax(logits_TE, 1).mean(0) * load).sum() * (static_cast<double>(E) / total);
}

at::Tensor z_loss(const at::Tensor& logits_TE) { return at::logsumexp(logits_TE, {1}).square().mean(); }

}  // namespace coterie
