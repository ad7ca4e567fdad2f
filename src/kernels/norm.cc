#include "kernels/norm.h"

#include <algorithm>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"

namespace coterie {

void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, float* out_TD,
              ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  parallel_rows(T, D, pool, [&](int64_t t) { kernels.rms_norm_row(x_TD + t * D, weight_D, eps, D, out_TD + t * D); });
}

void rms_norm_backward(const float* x_TD, const float* weight_D, const float* grad_TD, float eps, int64_t T, int64_t D,
                       float* grad_x_TD, float* grad_weight_D, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  constexpr int64_t kRowsPerPart = 128;
  const int64_t num_parts = (T + kRowsPerPart - 1) / kRowsPerPart;
  std::vector<float> parts(static_cast<size_t>(num_parts * D), 0.0f);  // of grad_weight_D, one row a task
  pool.run(num_parts, [&](int64_t part, int) {
    for (int64_t t = part * kRowsPerPart; t < std::min(T, (part + 1) * kRowsPerPart); ++t) {
      kernels.rms_norm_backward_row(x_TD + t * D, weight_D, grad_TD + t * D, eps, D, grad_x_TD + t * D,
                                    parts.data() + part * D);
    }
  });
  std::fill_n(grad_weight_D, D, 0.0f);
  for (int64_t part = 0; part < num_parts; ++part) {
    kernels.add_row(parts.data() + part * D, DType::kF32, grad_weight_D, D);
  }
}

void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                float* out_TD, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  parallel_rows(T, D, pool,
                [&](int64_t t) { kernels.layer_norm_row(x_TD + t * D, weight_D, bias_D, eps, D, out_TD + t * D); });
}

}  // namespace coterie
