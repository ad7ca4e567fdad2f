#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"

namespace coterie {
namespace {

// A sine costs about this many element-wise operations.
constexpr int64_t kSineCost = 16;

// A thread's cosines, then sines, of one position's angles.
const float* turn(int64_t position, const float* inverse_frequency, int64_t half) {
  thread_local std::vector<float> angles;
  angles.resize(static_cast<size_t>(2 * half));
  rope_angles(position, inverse_frequency, half, 1.0f, angles.data(), angles.data() + half);
  return angles.data();
}

void split_pairs(float* x, int64_t half) {
  thread_local std::vector<float> second;
  second.resize(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    second[static_cast<size_t>(i)] = x[2 * i + 1];
    x[i] = x[2 * i];
  }
  std::copy(second.begin(), second.end(), x + half);
}

}  // namespace

void rope_angles(int64_t position, const float* inverse_frequency, int64_t half, float factor, float* cosines,
                 float* sines) {
  for (int64_t i = 0; i < half; ++i) {
    // The product is rounded to fp32 before the sine, as everywhere in Hugging Face's models.
    const float angle = static_cast<float>(position) * inverse_frequency[i];
    cosines[i] = std::cos(angle) * factor;
    sines[i] = std::sin(angle) * factor;
  }
}

void rope(const RopeHeads& heads, const float* cosines, const float* sines, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  const int64_t half = heads.rotary_dim / 2;
  parallel_rows(heads.T, heads.rotary_dim * heads.num_heads, pool, [&](int64_t t) {
    for (int64_t h = 0; h < heads.num_heads; ++h) {
      float* const head = heads.x + t * heads.token_stride + h * heads.head_stride;
      if (heads.interleaved) split_pairs(head, half);
      kernels.rope_head(head, cosines + t * half, sines + t * half, half);
    }
  });
}

void rope_sequences(const Matrix& x, int64_t S, const float* inverse_frequency, int64_t num_heads, int64_t head_dim,
                    ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  const int64_t half = head_dim / 2, B = S > 0 ? x.rows / S : 0, columns = num_heads * head_dim;
  parallel_rows(S, columns * B + head_dim * kSineCost, pool, [&](int64_t position) {
    const float* const angles = turn(position, inverse_frequency, half);
    thread_local std::vector<float> heads;  // of one token, fp32
    heads.resize(static_cast<size_t>(columns));
    for (int64_t b = 0; b < B; ++b) {
      void* const row = x.row_range(b * S + position, 1).data;
      kernels.convert_row(row, x.dtype, heads.data(), DType::kF32, columns);
      for (int64_t h = 0; h < num_heads; ++h) {
        kernels.rope_head(heads.data() + h * head_dim, angles, angles + half, half);
      }
      kernels.convert_row(heads.data(), DType::kF32, row, x.dtype, columns);
    }
  });
}

}  // namespace coterie
