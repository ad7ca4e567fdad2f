// Rotary position embedding (Su et al., RoFormer). Of the first rotary_dim elements of a head, i and
// i + rotary_dim/2 turn together (Hugging Face's half-split layout), or, interleaved, 2 i and 2 i + 1.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "kernels/matrix.h"

namespace coterie {

// T tokens, token_stride floats apart, each with num_heads heads, head_stride floats apart.
struct RopeHeads {
  float* x = nullptr;
  int64_t T = 0;
  int64_t token_stride = 0;
  int64_t num_heads = 0;
  int64_t head_stride = 0;
  int64_t rotary_dim = 0;  // even; what lies behind in a head stays as it is
  bool interleaved = false;
};

// Rotates every head of every token in place. cosines and sines are [T, rotary_dim/2], see rope_angles. Interleaved
// pairs come out half-split: queries and keys are turned alike, so their products are the same.
void rope(const RopeHeads& heads, const float* cosines, const float* sines, ThreadPool& pool);

// Cosines and sines of one position, times `factor`. inverse_frequency holds `half` angles per position step,
// theta^(-2i/rotary_dim) in the plain case.
void rope_angles(int64_t position, const float* inverse_frequency, int64_t half, float factor, float* cosines,
                 float* sines);

// Half-split, whole heads, for whole sequences of S tokens, one behind the other: row t of x, fp32 or bf16, has
// position t % S. Columns behind the heads stay as they are.
void rope_sequences(const Matrix& x, int64_t S, const float* inverse_frequency, int64_t num_heads, int64_t head_dim,
                    ThreadPool& pool);

}  // namespace coterie
