// The forward pass of the experts: two grouped GEMMs and a combine.
#include "moe/experts.h"

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "kernels/workspace.h"
#include "moe/combine.h"

namespace coterie {
namespace {

// B of an expert's up or down product, [rows, cols]: its panels where there are any, else its part of all experts'.
void set_b(GemmProblem& problem, const PackedMatrix* packed_E, const void* plain, DType dtype, int64_t e, int64_t rows,
           int64_t cols) {
  if (packed_E) {
    problem.packed_b = packed_E + e;
  } else {
    problem.b = row_major(plain, dtype, (e + 1) * rows, cols).row_range(e * rows, rows);
  }
}

void check_shapes(const ExpertShape& shape, const Dispatch& dispatch, const ConstMatrix& x_TD, const Matrix& out_TD) {
  COTERIE_CHECK(static_cast<int64_t>(dispatch.offset_E1.size()) == shape.num_experts + 1,
                "dispatch is for other experts");
  COTERIE_CHECK(x_TD.cols == shape.hidden_size && out_TD.cols == shape.hidden_size, "hidden sizes differ");
  COTERIE_CHECK(x_TD.rows == dispatch.num_tokens && out_TD.rows == dispatch.num_tokens, "numbers of tokens differ");
}

// One problem for every expert that has rows.
template <typename Fill>
std::vector<GemmProblem> problems_of_experts(const Dispatch& dispatch, const Fill& fill) {
  std::vector<GemmProblem> problems;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(dispatch.offset_E1.size()); ++e) {
    const int64_t first = dispatch.offset_E1[e], count = dispatch.offset_E1[e + 1] - first;
    if (count == 0) continue;
    fill(problems.emplace_back(), e, first, count);
  }
  return problems;
}

// What the up products gather rows of: numbers, or the same quantized.
struct Input {
  ConstMatrix x_TD;
  const uint32_t* quantized_TD = nullptr;
};

void forward(const ExpertShape& shape, const ExpertWeights& w, const Dispatch& dispatch, const Input& input,
             const Matrix& out_TD, const Matrix& inner_RF, const Matrix& slopes_RU, float* down_RD, ThreadPool& pool,
             bool accumulate) {
  const int64_t D = shape.hidden_size, F = shape.intermediate_size, U = shape.up_rows();
  const auto up = problems_of_experts(dispatch, [&](GemmProblem& p, int64_t e, int64_t first, int64_t count) {
    p.a = input.x_TD;
    p.quantized_a = input.quantized_TD;
    COTERIE_CHECK(!input.quantized_TD || w.up_E[e].type() == w.up_E->type(), "experts are of several types");
    p.gather_M = dispatch.token_R.data() + first;
    p.num_gathered = count;
    set_b(p, w.up_E, w.up_EUD, w.dtype, e, U, D);
    if (w.up_bias_EU) p.bias_N = w.up_bias_EU + e * U;
    p.activation = shape.activation;
    p.gated = shape.gated;
    p.c = inner_RF.row_range(first, count);
    if (slopes_RU.data) p.slopes = slopes_RU.row_range(first, count);
  });
  grouped_gemm(up, pool);

  const bool direct = is_identity(dispatch);
  const Matrix rows_RD = direct ? out_TD : row_major(down_RD, dispatch.num_rows(), D);
  const auto down = problems_of_experts(dispatch, [&](GemmProblem& p, int64_t e, int64_t first, int64_t count) {
    p.a = inner_RF.row_range(first, count);
    set_b(p, w.down_E, w.down_EDF, w.dtype, e, D, F);
    if (w.down_bias_ED) p.bias_N = w.down_bias_ED + e * D;
    p.c = rows_RD.row_range(first, count);
    p.accumulate = direct && accumulate;
  });
  grouped_gemm(down, pool);
  if (!direct) combine(dispatch, down_RD, /*unweighted=*/false, out_TD, pool, accumulate);
}

PanelType type_of_up(const ExpertWeights& weights) {
  return weights.up_E ? weights.up_E->type() : panel_type(weights.dtype);
}

// Converting so few rows to bf16 by each expert costs less than a pass of its own; quantizing even one does not.
constexpr int64_t kLeastRowsRounded = 32;

// Rows that several experts take are rounded to what the products are of once, not by each of them. Of a row: units of
// memory that it takes then, or 0 where it stays as it is.
int64_t rounded_units(const ExpertWeights& weights, const Dispatch& dispatch, const ConstMatrix& x_TD) {
  if (dispatch.num_rows() < 2 * dispatch.num_tokens || x_TD.col_stride != 1) return 0;
  const PanelType type = type_of_up(weights);
  if (is_quantized(type)) return a_row_units(type, x_TD.cols);
  const bool converted = type == PanelType::kBF16 && x_TD.dtype == DType::kF32;
  return converted && x_TD.rows >= kLeastRowsRounded ? units_of(type, x_TD.cols) : 0;
}

Input rounded(const ConstMatrix& x_TD, PanelType type, uint32_t* memory, ThreadPool& pool) {
  if (is_quantized(type)) {
    quantize_rows(x_TD, type, memory, pool);
    return {x_TD, memory};
  }
  const auto* const x = static_cast<const float*>(x_TD.data);
  auto* const halves = reinterpret_cast<uint16_t*>(memory);
  const int64_t D = x_TD.cols;
  parallel_rows(x_TD.rows, D, pool, [&](int64_t t) {
    active_kernels().convert_row(x + t * x_TD.row_stride, DType::kF32, halves + t * D, DType::kBF16, D);
  });
  return {row_major(static_cast<const void*>(halves), DType::kBF16, x_TD.rows, D)};
}

Workspace& forward_workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

}  // namespace

PackedExperts::PackedExperts(const ExpertShape& expert_shape, const ExpertWeights& weights, ThreadPool& pool)
    : shape(expert_shape) {
  const int64_t E = shape.num_experts, D = shape.hidden_size, F = shape.intermediate_size, U = shape.up_rows();
  const ConstMatrix up = row_major(weights.up_EUD, weights.dtype, E * U, D);
  const ConstMatrix down = row_major(weights.down_EDF, weights.dtype, E * D, F);
  for (int64_t e = 0; e < E; ++e) {
    up_E.emplace_back(up.row_range(e * U, U), pool, shape.gated);
    down_E.emplace_back(down.row_range(e * D, D), pool);
  }
  if (weights.up_bias_EU) up_bias_EU.assign(weights.up_bias_EU, weights.up_bias_EU + E * U);
  if (weights.down_bias_ED) down_bias_ED.assign(weights.down_bias_ED, weights.down_bias_ED + E * D);
}

ExpertWeights PackedExperts::weights() const {
  const auto pointer = [](const std::vector<float>& bias) { return bias.empty() ? nullptr : bias.data(); };
  return {.up_bias_EU = pointer(up_bias_EU),
          .down_bias_ED = pointer(down_bias_ED),
          .dtype = down_E.front().dtype(),
          .up_E = up_E.data(),
          .down_E = down_E.data()};
}

void experts_forward(const ExpertShape& shape, const ExpertWeights& weights, const Dispatch& dispatch,
                     const ConstMatrix& x_TD, const Matrix& out_TD, ExpertsContext* context, ThreadPool& pool,
                     bool accumulate) {
  check_shapes(shape, dispatch, x_TD, out_TD);
  const int64_t R = dispatch.num_rows(), D = shape.hidden_size, F = shape.intermediate_size, U = shape.up_rows();
  // The down product packs its input as the weights' type: keeping it in that type loses nothing.
  const DType dtype = weights.dtype;
  const size_t inner_bytes = static_cast<size_t>(R * F) * dtype_size(dtype);
  const auto rounded_size = static_cast<size_t>(x_TD.rows * rounded_units(weights, dispatch, x_TD));
  Workspace& workspace = forward_workspace();
  workspace.reserve((context ? 0 : Workspace::padded(inner_bytes)) +
                    Workspace::padded(static_cast<size_t>(R * D) * sizeof(float)) +
                    Workspace::padded(rounded_size * sizeof(uint32_t)));
  Matrix inner_RF = row_major(context ? nullptr : workspace.take<char>(inner_bytes), dtype, R, F), slopes_RU;
  if (context) {
    context->inner_RF.reserve(inner_bytes);
    context->slopes_RU.reserve(static_cast<size_t>(R * U) * dtype_size(dtype));
    inner_RF.data = context->inner_RF.data();
    slopes_RU = row_major(context->slopes_RU.data(), dtype, R, U);
  }
  float* down_RD = workspace.take<float>(static_cast<size_t>(R * D));
  const Input input =
      rounded_size > 0 ? rounded(x_TD, type_of_up(weights), workspace.take<uint32_t>(rounded_size), pool) : Input{x_TD};
  forward(shape, weights, dispatch, input, out_TD, inner_RF, slopes_RU, down_RD, pool, accumulate);
}

}  // namespace coterie
