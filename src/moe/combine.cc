#include "moe/combine.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"

namespace coterie {
void combine(const Dispatch& dispatch, const float* rows_RD, bool unweighted, const Matrix& out_TD, ThreadPool& pool,
             bool accumulate) {
  const KernelTable& kernels = active_kernels();
  const int64_t T = dispatch.num_tokens, D = out_TD.cols;
  const int64_t K = T ? static_cast<int64_t>(dispatch.row_TK.size()) / T : 0;
  COTERIE_CHECK(K <= kMostChoices, "too many choices a token");
  COTERIE_CHECK(!accumulate || out_TD.dtype == DType::kF32, "sums are added to fp32");
  parallel_rows(T, D * (K + 1), pool, [&](int64_t t) {
    const float* rows[kMostChoices + 1];
    float weights[kMostChoices + 1];
    void* const out = out_TD.row_range(t, 1).data;
    int64_t count = 0;
    if (accumulate) {
      rows[count] = static_cast<const float*>(out);
      weights[count++] = 1.0f;
    }
    for (int64_t k = 0; k < K; ++k) {
      const int32_t row = dispatch.row_TK[t * K + k];
      if (row < 0) continue;
      rows[count] = rows_RD + row * D;
      weights[count++] = unweighted ? 1.0f : dispatch.weight_R[row];
    }
    kernels.combine_rows(rows, weights, count, out, out_TD.dtype, D);
  });
}

bool is_identity(const Dispatch& dispatch) {
  if (dispatch.num_rows() != dispatch.num_tokens) return false;
  for (int64_t r = 0; r < dispatch.num_rows(); ++r) {
    if (dispatch.token_R[r] != r || dispatch.weight_R[r] != 1.0f) return false;
  }
  return true;
}

}  // namespace coterie
