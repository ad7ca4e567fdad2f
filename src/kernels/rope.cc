#include "kernels/rope.h"

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
  for (int64_t i = 0; i < half; ++i) {
    // The product is rounded to fp32 before the sine, as everywhere in Hugging Face's models.
    const float angle = static_cast<float>(position) * inverse_frequency[i];
    angles[static_cast<size_t>(i)] = std::cos(angle);
    angles[static_cast<size_t>(half + i)] = std::sin(angle);
  }
  return angles.data();
}

}  // namespace

void rope(float* x, int64_t token_stride, const int32_t* positions_T, const float* inverse_frequency, int64_t T,
          int64_t num_heads, int64_t head_dim, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  const int64_t half = head_dim / 2;
  parallel_rows(T, head_dim * (num_heads + kSineCost), pool, [&](int64_t t) {
    const float* const angles = turn(positions_T[t], inverse_frequency, half);
    for (int64_t h = 0; h < num_heads; ++h) {
      kernels.rope_head(x + t * token_stride + h * head_dim, angles, angles + half, half);
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
