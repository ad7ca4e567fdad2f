#include <array>

#include "kernels/gemm.h"
#include "train/ops.h"
#include "train/packed_weights.h"
#include "train/torch_op.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalType = std::optional<at::ScalarType>;
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, OptionalType);
using Wanted = std::array<bool, 3>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of x, weight and bias
using LinearBackward = Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                 Wanted);
constexpr const char* kOp = "coterie::linear";

void check(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, OptionalType dtype) {
  check_floating(x, kOp, "x");
  check_floating(weight, kOp, "weight");
  TORCH_CHECK_VALUE(x.dim() >= 1, kOp, ": x has no axes");
  check_axes(weight, 2, kOp, "weight");
  check_size(x, x.dim() - 1, weight.sym_size(1), kOp, "x");
  const at::ScalarType type = dtype.value_or(x.scalar_type());
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16, kOp, ": dtype is ", type,
                   ", neither Float nor BFloat16");
  if (!given(bias)) return;
  check_floating(*bias, kOp, "bias");
  check_axes(*bias, 1, kOp, "bias");
  check_size(*bias, 0, weight.sym_size(0), kOp, "bias");
}

// [..., C] as a matrix [T, C].
at::Tensor rows_of(const at::Tensor& x) {
  return x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)});
}

at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, OptionalType dtype) {
  check(x, weight, bias, dtype);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  const at::Tensor y = pooled_empty(sizes, dtype.value_or(x.scalar_type())), bias_N = as_float(bias), x_TD = rows_of(x);
  GemmProblem problem{.a = const_matrix(x_TD), .c = matrix(rows_of(y)), .bias_N = float_pointer(bias_N)};
  const auto panels = packed_weight(weight);
  if (panels) {
    problem.packed_b = panels->matrices();
  } else {
    problem.b = const_matrix(weight);
  }
  gemm(problem, torch_pool());
  return y;
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, OptionalType dtype) {
  check(x, weight, bias, dtype);
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, x.options().dtype(dtype.value_or(x.scalar_type())));
}

Gradients backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                       const OptionalTensor& bias, Wanted wanted) {
  const at::Tensor grad_TN = rows_of(grad_y), x_TD = rows_of(x);
  const at::Tensor grad_x = gradient_of(x, wanted[0]), grad_weight = gradient_of(weight, wanted[1]);
  std::vector<GemmProblem> problems;
  if (wanted[0]) {
    problems.push_back(
        {.a = const_matrix(grad_TN), .b = const_matrix(weight).transposed(), .c = matrix(rows_of(grad_x))});
  }
  if (wanted[1]) {
    problems.push_back({.a = const_matrix(grad_TN).transposed(),
                        .b = const_matrix(x_TD).transposed(),
                        .panels = dtype_of(weight),
                        .c = matrix(grad_weight)});
  }
  grouped_gemm(problems, torch_pool());
  return {grad_x, grad_weight,
          wanted[2] ? grad_TN.sum(0, false, at::kFloat).to(bias->scalar_type()) : at::empty({0}, weight.options())};
}

Gradients backward_meta(const at::Tensor& /*grad_y*/, const at::Tensor& x, const at::Tensor& weight,
                        const OptionalTensor& bias, Wanted wanted) {
  return {meta_gradient_of(x, wanted[0], x), meta_gradient_of(weight, wanted[1], weight),
          meta_gradient_of(wanted[2] ? bias : std::nullopt, wanted[2], weight)};
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias, OptionalType dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight, bias.value_or(at::Tensor())});
    static const auto op = find_op<Linear>("coterie::linear");
    return op.call(x, weight, bias, dtype);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const variable_list saved = context->get_saved_variables();
    const std::vector<bool> wanted = wanted_gradients(*context, saved);
    static const auto op = find_op<LinearBackward>("coterie::linear_backward");
    auto [grad_x, grad_weight, grad_bias] =
        op.call(grads[0], saved[0], saved[1], if_defined(saved[2]), {wanted[0], wanted[1], wanted[2]});
    variable_list gradients = wanted_only({grad_x, grad_weight, grad_bias}, wanted);
    gradients.resize(4);  // dtype has none
    return gradients;
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            OptionalType dtype) {
  if (wants_graph({x, weight, bias})) return LinearFunction::apply(x, weight, bias, dtype);
  const at::AutoDispatchBelowADInplaceOrView below;
  return linear(x, weight, bias.value_or(at::Tensor()), dtype);
}

at::Tensor forward_autocast(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            OptionalType dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return linear(autocast(x), autocast(weight), autocast(bias).value_or(at::Tensor()), dtype);
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight_ND, const at::Tensor& bias_N,
                  std::optional<at::ScalarType> dtype) {
  static const auto op = find_op<Linear>("coterie::linear");
  return op.call(x, weight_ND, if_defined(bias_N), dtype);
}

TORCH_LIBRARY_FRAGMENT(coterie, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, ScalarType? dtype=None) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool[3] wanted) -> (Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("linear", forward_cpu);
  m.impl("linear_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(coterie, Meta, m) {
  m.impl("linear", forward_meta);
  m.impl("linear_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(coterie, Autograd, m) {
  m.impl("linear", forward_autograd);
  m.impl("linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(coterie, AutocastCPU, m) { m.impl("linear", forward_autocast); }

}  // namespace coterie
