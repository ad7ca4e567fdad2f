#include "kernels/norm.h"

#include <algorithm>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"

namespace coterie {
namespace {

// Calls row(first element, sum of weight's gradient, of bias's) for every row. The sums are of parts of the rows.
template <typename Row>
void backward_by_parts(const NormBackward& b, ThreadPool& pool, const Row& row) {
  const KernelTable& kernels = active_kernels();
  constexpr int64_t kRowsPerPart = 128;
  const int64_t num_parts = (b.T + kRowsPerPart - 1) / kRowsPerPart, D = b.D;
  std::vector<float> parts(static_cast<size_t>(2 * num_parts * D), 0.0f);  // weight's and bias's, two rows a part
  pool.run(num_parts, [&](int64_t part, int) {
    float* const sums = parts.data() + 2 * part * D;
    for (int64_t t = part * kRowsPerPart; t < std::min(b.T, (part + 1) * kRowsPerPart); ++t) {
      row(t * D, sums, sums + D);
      if (b.residual_TD) kernels.add_row(b.residual_TD + t * D, DType::kF32, b.grad_x_TD + t * D, D);
    }
  });
  const auto add_parts = [&](int64_t offset, float* sum) {
    std::fill_n(sum, D, 0.0f);
    for (int64_t part = 0; part < num_parts; ++part) {
      kernels.add_row(parts.data() + 2 * part * D + offset, DType::kF32, sum, D);
    }
  };
  add_parts(0, b.grad_weight_D);
  if (b.grad_bias_D) add_parts(D, b.grad_bias_D);
}

}  // namespace

void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, float* out_TD,
              ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  parallel_rows(T, D, pool, [&](int64_t t) { kernels.rms_norm_row(x_TD + t * D, weight_D, eps, D, out_TD + t * D); });
}

void rms_norm_backward(const NormBackward& b, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  backward_by_parts(b, pool, [&](int64_t row, float* weight_sum, float* /*bias_sum*/) {
    kernels.rms_norm_backward_row(b.x_TD + row, b.weight_D, b.grad_TD + row, b.eps, b.D, b.grad_x_TD + row, weight_sum);
  });
}

void layer_norm_backward(const NormBackward& b, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  backward_by_parts(b, pool, [&](int64_t row, float* weight_sum, float* bias_sum) {
    kernels.layer_norm_backward_row(b.x_TD + row, b.weight_D, b.grad_TD + row, b.eps, b.D, b.grad_x_TD + row,
                                    weight_sum, bias_sum);
  });
}

void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                float* out_TD, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  parallel_rows(T, D, pool,
                [&](int64_t t) { kernels.layer_norm_row(x_TD + t * D, weight_D, bias_D, eps, D, out_TD + t * D); });
}

}  // namespace coterie
