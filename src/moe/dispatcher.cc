#include "moe/dispatcher.h"

#include <numeric>

namespace coterie {

Dispatch make_dispatch(const Routing& routing) {
  const int64_t T = routing.num_tokens, E = routing.num_experts, K = routing.top_k;
  Dispatch dispatch;
  dispatch.num_tokens = T;
  dispatch.offset_E1.assign(static_cast<size_t>(E + 1), 0);
  std::partial_sum(routing.tokens_per_expert_E.begin(), routing.tokens_per_expert_E.end(),
                   dispatch.offset_E1.begin() + 1);
  const auto R = static_cast<size_t>(dispatch.offset_E1.back());
  dispatch.token_R.resize(R);
  dispatch.choice_R.resize(R);
  dispatch.weight_R.resize(R);
  dispatch.row_TK.assign(static_cast<size_t>(T * K), -1);
  std::vector<int64_t> next_E(dispatch.offset_E1.begin(), dispatch.offset_E1.end() - 1);
  for (int64_t choice = 0; choice < T * K; ++choice) {
    if (!routing.kept_TK[choice]) continue;
    const int64_t row = next_E[routing.expert_ids_TK[choice]]++;
    dispatch.token_R[row] = static_cast<int32_t>(choice / K);
    dispatch.choice_R[row] = static_cast<int32_t>(choice);
    dispatch.weight_R[row] = routing.weights_TK[choice];
    dispatch.row_TK[choice] = static_cast<int32_t>(row);
  }
  return dispatch;
}

Dispatch dense_dispatch(int64_t num_tokens) {
  const auto T = static_cast<size_t>(num_tokens);
  Dispatch dispatch;
  dispatch.num_tokens = num_tokens;
  dispatch.offset_E1 = {0, num_tokens};
  dispatch.token_R.resize(T);
  std::iota(dispatch.token_R.begin(), dispatch.token_R.end(), 0);
  dispatch.choice_R = dispatch.row_TK = dispatch.token_R;
  dispatch.weight_R.assign(T, 1.0f);
  return dispatch;
}

}  // namespace coterie
