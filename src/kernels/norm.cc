#include "kernels/norm.h"

#include <algorithm>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"

namespace coterie {

void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, float* out_TD,
              ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  parallel_rows(T, D, pool, [&](int64_t t) {
    kernels.rms_norm_row(x_TD + t * D, weight_D, eps, D, out_TD + t * D);
  });
}

void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                float* out_TD, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  parallel_rows(T, D, pool, [&](int64_t t) {
    kernels.layer_norm_row(x_TD + t * D, weight_D, bias_D, eps, D, out_TD + t * D);
  });
}

}  // namespace coterie
