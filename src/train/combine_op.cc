// coterie::combine adds up each token's rows, times their weights: what becomes of experts that were run part by part
// (coterie::dispatch, coterie::grouped_linear).
#include <array>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "moe/combine.h"
#include "train/choice_order.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Wanted = std::array<bool, 2>;
using Gradients = std::tuple<at::Tensor, at::Tensor>;  // of rows and weights
constexpr const char* kOp = "coterie::combine";

void check(const at::Tensor& rows, const at::Tensor& order, const at::Tensor& weights) {
  check_floating(rows, kOp, "rows");
  check_floating(weights, kOp, "weights");
  check_axes(rows, 2, kOp, "rows");
  check_axes(weights, 2, kOp, "weights");
  check_order(order, kOp);
  check_size(order, 0, rows.sym_size(0), kOp, "order");
  check_size(order, 0, weights.sym_numel(), kOp, "order");
}

at::Tensor forward_cpu(const at::Tensor& rows, const at::Tensor& order, const at::Tensor& weights) {
  check(rows, order, weights);
  const int64_t T = weights.size(0), D = rows.size(1);
  const at::Tensor rows_RD = as_float(rows), weights_TK = as_float(weights);
  const at::Tensor out = pooled_empty({T, D}, at::kFloat);
  combine(dispatch_of_order(order, T, float_pointer(weights_TK), kOp), float_pointer(rows_RD), /*unweighted=*/false,
          matrix(out), torch_pool());
  return out;
}

at::Tensor forward_meta(const at::Tensor& rows, const at::Tensor& order, const at::Tensor& weights) {
  check(rows, order, weights);
  return at::empty_symint({weights.sym_size(0), rows.sym_size(1)}, rows.options().dtype(at::kFloat));
}

Gradients backward_cpu(const at::Tensor& grad_out, const at::Tensor& rows, const at::Tensor& order,
                       const at::Tensor& weights, Wanted wanted) {
  const int64_t T = weights.size(0), D = rows.size(1);
  const at::Tensor grad = as_float(grad_out), rows_RD = as_float(rows), weights_TK = as_float(weights);
  const Dispatch dispatch = dispatch_of_order(order, T, float_pointer(weights_TK), kOp);
  const at::Tensor grad_rows = gradient_of(rows, wanted[0]);
  const at::Tensor grad_weights = gradient_of(weights_TK, wanted[1]);
  const KernelTable& kernels = active_kernels();
  parallel_rows(dispatch.num_rows(), 2 * D, torch_pool(), [&](int64_t r) {
    const float* const of_token = float_pointer(grad) + dispatch.token_R[r] * D;
    if (wanted[0]) {
      const Matrix row = matrix(grad_rows).row_range(r, 1);
      kernels.scale_row(of_token, DType::kF32, dispatch.weight_R[r], row.data, row.dtype, D);
    }
    if (!wanted[1]) return;
    grad_weights.mutable_data_ptr<float>()[dispatch.choice_R[r]] =
        kernels.dot_row(of_token, DType::kF32, float_pointer(rows_RD) + r * D, D);
  });
  return {grad_rows, grad_weights.to(weights.scalar_type())};
}

Gradients backward_meta(const at::Tensor& /*grad*/, const at::Tensor& rows, const at::Tensor& /*order*/,
                        const at::Tensor& weights, Wanted wanted) {
  return {meta_gradient_of(rows, wanted[0], rows), meta_gradient_of(weights, wanted[1], weights)};
}

const auto& op() {
  static const auto handle = find_op<decltype(forward_cpu)>(kOp);
  return handle;
}

struct CombineFunction : torch::autograd::Function<CombineFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, const at::Tensor& order,
                            const at::Tensor& weights) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({rows, order, weights});
    return op().call(rows, order, weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const variable_list saved = context->get_saved_variables();
    const std::vector<bool> wanted = wanted_gradients(*context, saved);
    static const auto backward_op = find_op<decltype(backward_cpu)>("coterie::combine_backward");
    auto [grad_rows, grad_weights] = backward_op.call(grads[0], saved[0], saved[1], saved[2], {wanted[0], wanted[2]});
    return wanted_only({grad_rows, at::Tensor(), grad_weights}, wanted);
  }
};

at::Tensor forward_autograd(const at::Tensor& rows, const at::Tensor& order, const at::Tensor& weights) {
  if (wants_graph({rows, weights})) return CombineFunction::apply(rows, order, weights);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op().call(rows, order, weights);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(coterie, m) {
  m.def("combine(Tensor rows, Tensor order, Tensor weights) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor rows, Tensor order, Tensor weights, bool[2] wanted) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("combine", forward_cpu);
  m.impl("combine_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(coterie, Meta, m) {
  m.impl("combine", forward_meta);
  m.impl("combine_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(coterie, Autograd, m) {
  m.impl("combine", forward_autograd);
  m.impl("combine_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace coterie
