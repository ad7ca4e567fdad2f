#include "moe/dispatcher.h"

#include <numeric>

#include "base/check.h"

namespace coterie {
namespace {

// Counting sort: expert_of(choice) is the expert of choice t*K + k, or -1.
template <typename ExpertOf>
Dispatch sort_choices(int64_t num_tokens, int64_t top_k, int64_t num_experts, const float* weights_TK,
                      const ExpertOf& expert_of) {
  const int64_t num_choices = num_tokens * top_k;
  COTERIE_CHECK(num_choices <= INT32_MAX, "choices are numbered in 32 bits");
  Dispatch dispatch;
  dispatch.num_tokens = num_tokens;
  dispatch.offset_E1.assign(static_cast<size_t>(num_experts + 1), 0);
  dispatch.row_TK.assign(static_cast<size_t>(num_choices), -1);
  for (int64_t choice = 0; choice < num_choices; ++choice) {
    const int64_t expert = expert_of(choice);
    if (expert >= 0) ++dispatch.offset_E1[expert + 1];
  }
  std::partial_sum(dispatch.offset_E1.begin(), dispatch.offset_E1.end(), dispatch.offset_E1.begin());
  const auto R = static_cast<size_t>(dispatch.offset_E1.back());
  dispatch.token_R.resize(R);
  dispatch.choice_R.resize(R);
  dispatch.weight_R.resize(R);
  std::vector<int64_t> next_E(dispatch.offset_E1.begin(), dispatch.offset_E1.end() - 1);
  for (int64_t choice = 0; choice < num_choices; ++choice) {
    const int64_t expert = expert_of(choice);
    if (expert < 0) continue;
    const int64_t row = next_E[expert]++;
    dispatch.token_R[row] = static_cast<int32_t>(choice / top_k);
    dispatch.choice_R[row] = static_cast<int32_t>(choice);
    dispatch.weight_R[row] = weights_TK ? weights_TK[choice] : 1.0f;
    dispatch.row_TK[choice] = static_cast<int32_t>(row);
  }
  return dispatch;
}

}  // namespace

Dispatch make_dispatch(const Routing& routing) {
  return sort_choices(routing.num_tokens, routing.top_k, routing.num_experts, routing.weights_TK.data(),
                      [&](int64_t choice) { return routing.kept_TK[choice] ? routing.expert_ids_TK[choice] : -1; });
}

template <typename Id>
Dispatch make_dispatch(const Id* expert_ids_TK, const float* weights_TK, int64_t num_tokens, int64_t top_k,
                       int64_t num_experts) {
  return sort_choices(num_tokens, top_k, num_experts, weights_TK, [&](int64_t choice) {
    const Id expert = expert_ids_TK[choice];
    return expert >= 0 && expert < num_experts ? static_cast<int64_t>(expert) : -1;
  });
}

template Dispatch make_dispatch(const int32_t*, const float*, int64_t, int64_t, int64_t);
template Dispatch make_dispatch(const int64_t*, const float*, int64_t, int64_t, int64_t);

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
