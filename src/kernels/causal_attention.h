// Causal self-attention of whole sequences, forward and backward: the attention of training. (attention.h is that of
// serving, over a cache.) Legend: B sequences, S tokens of each, T = B * S, H query heads, G key and value heads,
// d head_dim, C = (H + 2 G) d.
//
// Nothing of size S * S outlives a task: forward keeps the logarithm of each softmax's sum, and backward computes the
// weights from it anew (Dao, "FlashAttention-2", 2023, algorithms 1 and 2; a task here sees whole rows of scores, so
// that no softmax is corrected on the way, and backward needs no `out`).
//
// Arithmetic: operands of all products are of qkv's type, sums fp32; scores, softmax and its gradient are fp32. The
// weights are rounded to qkv's type before they are divided by their sum.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "kernels/matrix.h"

namespace coterie {

struct CausalShape {
  int64_t B = 0, S = 0, H = 0, G = 0, d = 0;

  int64_t num_tokens() const { return B * S; }
  int64_t columns() const { return (H + 2 * G) * d; }
  float scale() const;  // of scores: 1 / sqrt(d)
};

// out [T, H * d] of qkv [T, C], whose rows are queries, keys, values, each head by head. logsumexp_BHS receives
// log(sum of exp(score)) of each query.
void causal_attention(const CausalShape& shape, const ConstMatrix& qkv_TC, const Matrix& out, float* logsumexp_BHS,
                      ThreadPool& pool);

// The gradient of qkv, overwritten. `logsumexp_BHS` is forward's.
void causal_attention_backward(const CausalShape& shape, const ConstMatrix& qkv_TC, const float* logsumexp_BHS,
                               const ConstMatrix& grad_out, const Matrix& grad_qkv_TC, ThreadPool& pool);

}  // namespace coterie
