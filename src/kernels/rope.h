// Rotary position embedding (Su et al., RoFormer), in Hugging Face's half-split layout: element i
// pairs with element i + head_dim/2.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "kernels/matrix.h"

namespace coterie {

// Rotates every head of every token in place. x has T tokens `token_stride` floats apart, each with
// num_heads contiguous heads of head_dim (even). positions_T are absolute. inverse_frequency holds
// head_dim/2 angles per position step, theta^(-2i/head_dim) in the plain case.
void rope(float* x, int64_t token_stride, const int32_t* positions_T, const float* inverse_frequency, int64_t T,
          int64_t num_heads, int64_t head_dim, ThreadPool& pool);

// The same for whole sequences of S tokens, one behind the other: row t of x, fp32 or bf16, has position t % S. Columns
// behind the heads stay as they are.
void rope_sequences(const Matrix& x, int64_t S, const float* inverse_frequency, int64_t num_heads, int64_t head_dim,
                    ThreadPool& pool);

}  // namespace coterie
