#include "kernels/rope.h"

#include <cmath>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"

namespace coterie {

void rope(float* x, int64_t token_stride, const int32_t* positions_T, const float* inverse_frequency, int64_t T,
          int64_t num_heads, int64_t head_dim, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  const int64_t half = head_dim / 2;
  // A sine costs about 16 element-wise operations.
  parallel_rows(T, head_dim * (num_heads + 16), pool, [&](int64_t t) {
    thread_local std::vector<float> angles;
    angles.resize(static_cast<size_t>(2 * half));
    float* cosine = angles.data();
    float* sine = cosine + half;
    for (int64_t i = 0; i < half; ++i) {
      // The product is rounded to fp32 before the sine, as everywhere in Hugging Face's models.
      const float angle = static_cast<float>(positions_T[t]) * inverse_frequency[i];
      cosine[i] = std::cos(angle);
      sine[i] = std::sin(angle);
    }
    for (int64_t h = 0; h < num_heads; ++h) kernels.rope_head(x + t * token_stride + h * head_dim, cosine, sine, half);
  });
}

}  // namespace coterie
