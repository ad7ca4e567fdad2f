// The permutation between tokens and experts: a counting sort by expert, never a one-hot einsum
// (DeepSpeed-MoE section 5: S*E*M*c -> S*M*c). Legend: T tokens, E experts, K top-k, R = routed rows
// (kept choices, at most T*K), grouped by expert, within an expert in token order.
#pragma once

#include <cstdint>
#include <vector>

#include "moe/router.h"

namespace coterie {

struct Dispatch {
  int64_t num_tokens = 0;
  std::vector<int64_t> offset_E1;  // rows of expert e are [offset_E1[e], offset_E1[e + 1])
  std::vector<int32_t> token_R;    // the token that row r carries
  std::vector<int32_t> choice_R;   // index t*K + k of the choice that row r serves
  std::vector<float> weight_R;     // its routing weight
  std::vector<int32_t> row_TK;     // row of choice t*K + k, or -1 when it was dropped

  int64_t num_rows() const { return static_cast<int64_t>(token_R.size()); }
};

Dispatch make_dispatch(const Routing& routing);

// The same from bare ids [T, K], int32_t or int64_t; an id outside [0, num_experts) is no expert, like a dropped
// choice. With null weights every weight is 1. At most 2^31 - 1 choices.
template <typename Id>
Dispatch make_dispatch(const Id* expert_ids_TK, const float* weights_TK, int64_t num_tokens, int64_t top_k,
                       int64_t num_experts);

// Every token to expert 0 with weight 1: the form in which a dense MLP is a group of one expert.
Dispatch dense_dispatch(int64_t num_tokens);

}  // namespace coterie
