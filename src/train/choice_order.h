// The rows of a layer's choices in the order that coterie::dispatch gives, as the kernels take them.
// Legend: T tokens, K choices of each, R = T K rows.
#pragma once

#include <algorithm>

#include "moe/combine.h"
#include "moe/dispatcher.h"
#include "train/torch_op.h"

namespace coterie {

// order [R]: a permutation of the choices t*K + k, one for each row. Rows have the weights [T, K] that are given (fp32,
// contiguous), or 1; experts are not told apart. `op` is named in what is refused.
inline Dispatch dispatch_of_order(const at::Tensor& order, int64_t num_tokens, const float* weights_TK,
                                  const char* op) {
  const int64_t R = order.numel(), K = num_tokens > 0 ? R / num_tokens : 0;
  TORCH_CHECK_VALUE(R == num_tokens * K && R <= INT32_MAX, op, ": order has ", R, " choices of ", num_tokens,
                    " tokens");
  TORCH_CHECK_VALUE(K <= kMostChoices, op, ": order has ", K, " choices a token, more than ", kMostChoices);
  const at::Tensor choices = order.contiguous();
  const auto* const choice_R = choices.const_data_ptr<int64_t>();
  Dispatch dispatch;
  dispatch.num_tokens = num_tokens;
  dispatch.offset_E1 = {0, R};
  dispatch.row_TK.assign(static_cast<size_t>(R), -1);
  dispatch.token_R.reserve(std::max<size_t>(R, 1));  // never null: no row at all is a gather, too
  for (int64_t r = 0; r < R; ++r) {
    const int64_t choice = choice_R[r];
    TORCH_CHECK_VALUE(choice >= 0 && choice < R && dispatch.row_TK[choice] < 0, op, ": order has ", choice, " at ", r,
                      ", and is no permutation of ", R, " choices");
    dispatch.row_TK[choice] = static_cast<int32_t>(r);
    dispatch.token_R.push_back(static_cast<int32_t>(choice / K));
    dispatch.choice_R.push_back(static_cast<int32_t>(choice));
    dispatch.weight_R.push_back(weights_TK ? weights_TK[choice] : 1.0f);
  }
  return dispatch;
}

inline void check_order(const at::Tensor& order, const char* op) {
  TORCH_CHECK_TYPE(order.scalar_type() == at::kLong, op, ": order is ", order.scalar_type(), ", not Long");
  check_axes(order, 1, op, "order");
}

}  // namespace coterie
