// The backward pass of the experts. With g the gradient of a token's output, w the routing weight of a
// row, h = inner and y = W_down h + b the row's output:
//   raw        = g W_down                    (gradient of h, before w)
//   grad_w     = g . y = raw . h + g . b     (so that y need not be kept)
//   grad_pre   = w * raw * slopes            (kept by the forward pass)
//   grad_down  = sum of (w g) h^T,  grad_up = sum of grad_pre x^T,  grad_x = sum of grad_pre W_up
// Every product takes operands of the weights' type, those of the weights' gradients too.
#include <algorithm>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "kernels/workspace.h"
#include "moe/combine.h"
#include "moe/experts.h"

namespace coterie {
namespace {

constexpr int64_t kBiasColumns = 64;  // columns of a bias that one task sums

struct Backward {
  const ExpertShape& shape;
  const ExpertWeights& weights;
  const Dispatch& dispatch;
  const ConstMatrix& x_TD;
  const ConstMatrix& grad_out_TD;
  const ExpertsContext& context;
  const ExpertGradients& gradients;
  ThreadPool& pool;

  const KernelTable& kernels = active_kernels();
  const int64_t E = shape.num_experts, D = shape.hidden_size, F = shape.intermediate_size, U = shape.up_rows();
  const int64_t R = dispatch.num_rows();
  const DType dtype = weights.dtype;  // of what lies between the products
  const ConstMatrix up_ERows = row_major(weights.up_EUD, weights.dtype, E* U, D);
  const ConstMatrix down_ERows = row_major(weights.down_EDF, weights.dtype, E* D, F);
  const ConstMatrix slopes_RU = row_major(context.slopes_RU.data(), dtype, R, U);
  const ConstMatrix inner_RF = row_major(context.inner_RF.data(), dtype, R, F);
  Matrix raw_RF = {}, grad_pre_RU = {}, weighted_RD = {};
  float* grad_x_RD = nullptr;

  bool wants_pre() const { return gradients.grad_x_TD || gradients.grad_up_EUD || gradients.grad_up_bias_EU; }
  bool wants_raw() const { return wants_pre() || gradients.grad_weight_R; }
  bool wants_weighted() const { return gradients.grad_down_EDF || gradients.grad_down_bias_ED; }
  int64_t first_row(int64_t e) const { return dispatch.offset_E1[e]; }
  int64_t num_rows(int64_t e) const { return dispatch.offset_E1[e + 1] - dispatch.offset_E1[e]; }

  void run() {
    take_workspace();
    if (wants_raw()) {
      multiply_raw();
      activation_backward();
    }
    if (wants_weighted()) weigh_gradients();
    multiply_gradients();
    if (gradients.grad_x_TD) {
      combine(dispatch, grad_x_RD, /*unweighted=*/true, row_major(gradients.grad_x_TD, x_TD.dtype, x_TD.rows, D), pool);
    }
    if (gradients.grad_up_bias_EU) sum_rows(grad_pre_RU, gradients.grad_up_bias_EU);
    if (gradients.grad_down_bias_ED) sum_rows(weighted_RD, gradients.grad_down_bias_ED);
  }

  void take_workspace() {
    static thread_local Workspace workspace;
    const auto bytes = [&](bool wanted, int64_t cols, DType type) {
      return wanted ? static_cast<size_t>(R * cols) * dtype_size(type) : 0;
    };
    const size_t raw = bytes(wants_raw(), F, dtype), grad_pre = bytes(wants_raw(), U, dtype);
    const size_t weighted = bytes(wants_weighted(), D, dtype);
    const size_t grad_x = bytes(gradients.grad_x_TD != nullptr, D, DType::kF32);
    workspace.reserve(Workspace::padded(raw) + Workspace::padded(grad_pre) + Workspace::padded(weighted) +
                      Workspace::padded(grad_x));
    raw_RF = row_major(workspace.take<char>(raw), dtype, R, F);
    grad_pre_RU = row_major(workspace.take<char>(grad_pre), dtype, R, U);
    weighted_RD = row_major(workspace.take<char>(weighted), dtype, R, D);
    grad_x_RD = workspace.take<float>(grad_x / sizeof(float));
  }

  void multiply_raw() {
    std::vector<GemmProblem> problems;
    for (int64_t e = 0; e < E; ++e) {
      if (num_rows(e) == 0) continue;
      GemmProblem& p = problems.emplace_back();
      p.a = grad_out_TD;
      p.gather_M = dispatch.token_R.data() + first_row(e);
      p.num_gathered = num_rows(e);
      p.b = down_ERows.row_range(e * D, D).transposed();
      p.c = raw_RF.row_range(first_row(e), num_rows(e));
    }
    grouped_gemm(problems, pool);
  }

  void activation_backward() {
    parallel_rows(R, 4 * U, pool, [&](int64_t r) {
      ActivationBackwardRow row;
      row.grad_inner_F = raw_RF.row_range(r, 1).data;
      row.slopes_U = slopes_RU.row_range(r, 1).data;
      row.inner_F = inner_RF.row_range(r, 1).data;
      row.grad_pre_U = grad_pre_RU.row_range(r, 1).data;
      row.dtype = dtype;
      row.F = F;
      row.weight = dispatch.weight_R[r];
      row.gated = shape.gated;
      const float dot = kernels.activate_backward_row(row);
      if (gradients.grad_weight_R) gradients.grad_weight_R[r] = dot + bias_part(r);
    });
  }

  // g . b of the row's token and expert.
  float bias_part(int64_t r) const {
    if (!weights.down_bias_ED) return 0.0f;
    const auto after = std::upper_bound(dispatch.offset_E1.begin(), dispatch.offset_E1.end(), r);
    const int64_t e = after - dispatch.offset_E1.begin() - 1;
    return kernels.dot_row(grad_out_TD.row_range(dispatch.token_R[r], 1).data, grad_out_TD.dtype,
                           weights.down_bias_ED + e * D, D);
  }

  void weigh_gradients() {
    parallel_rows(R, D, pool, [&](int64_t r) {
      kernels.scale_row(grad_out_TD.row_range(dispatch.token_R[r], 1).data, grad_out_TD.dtype, dispatch.weight_R[r],
                        weighted_RD.row_range(r, 1).data, dtype, D);
    });
  }

  // The three products that are left, in one group.
  void multiply_gradients() {
    std::vector<GemmProblem> problems;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t first = first_row(e), count = num_rows(e);
      const ConstMatrix grad_pre = ConstMatrix(grad_pre_RU).row_range(first, count);
      if (gradients.grad_x_TD) {
        GemmProblem& p = problems.emplace_back();
        p.a = grad_pre;
        p.b = up_ERows.row_range(e * U, U).transposed();
        p.c = row_major(grad_x_RD, R, D).row_range(first, count);
      }
      if (gradients.grad_up_EUD) {
        GemmProblem& p = problems.emplace_back();
        p.a = grad_pre.transposed();
        p.b = x_TD.transposed();
        p.b_gather_K = dispatch.token_R.data() + first;
        p.panels = weights.dtype;
        p.c = row_major(gradients.grad_up_EUD, weights.dtype, E * U, D).row_range(e * U, U);
      }
      if (gradients.grad_down_EDF) {
        GemmProblem& p = problems.emplace_back();
        p.a = ConstMatrix(weighted_RD).row_range(first, count).transposed();
        p.b = inner_RF.row_range(first, count).transposed();
        p.c = row_major(gradients.grad_down_EDF, weights.dtype, E * D, F).row_range(e * D, D);
      }
    }
    grouped_gemm(problems, pool);
  }

  // sums_EC[e] = sum of an expert's rows, in their order.
  void sum_rows(const Matrix& rows_RC, float* sums_EC) {
    const int64_t C = rows_RC.cols, blocks = (C + kBiasColumns - 1) / kBiasColumns;
    pool.run(E * blocks, [&](int64_t task, int) {
      const int64_t e = task / blocks, column = task % blocks * kBiasColumns, n = std::min(kBiasColumns, C - column);
      float* sums = sums_EC + e * C + column;
      std::fill(sums, sums + n, 0.0f);
      for (int64_t r = first_row(e); r < first_row(e) + num_rows(e); ++r) {
        const auto* row = static_cast<const char*>(rows_RC.row_range(r, 1).data);
        kernels.add_row(row + column * static_cast<int64_t>(dtype_size(dtype)), dtype, sums, n);
      }
    });
  }
};

}  // namespace

void experts_backward(const ExpertShape& shape, const ExpertWeights& weights, const Dispatch& dispatch,
                      const ConstMatrix& x_TD, const ConstMatrix& grad_out_TD, const ExpertsContext& context,
                      const ExpertGradients& gradients, ThreadPool& pool) {
  COTERIE_CHECK(static_cast<int64_t>(dispatch.offset_E1.size()) == shape.num_experts + 1,
                "dispatch is for other experts");
  COTERIE_CHECK(x_TD.cols == shape.hidden_size && grad_out_TD.cols == shape.hidden_size, "hidden sizes differ");
  COTERIE_CHECK(x_TD.rows == dispatch.num_tokens && grad_out_TD.rows == dispatch.num_tokens,
                "numbers of tokens differ");
  COTERIE_CHECK(!weights.up_E && !weights.down_E, "the backward pass needs the weights themselves");
  Backward{shape, weights, dispatch, x_TD, grad_out_TD, context, gradients, pool}.run();
}

}  // namespace coterie
