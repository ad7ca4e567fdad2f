#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/gemm.h"
#include "train/ops.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearOp : torch::autograd::Function<LinearOp> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    const at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
    gemm({.a = const_matrix(x), .b = const_matrix(weight), .c = matrix(y), .bias_N = float_data(bias)}, torch_pool());
    context->save_for_backward({x, weight, bias.value_or(at::Tensor())});
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& x = saved[0];
    const at::Tensor& weight = saved[1];
    const at::Tensor grad = grads[0].contiguous();
    at::Tensor grad_x, grad_weight, grad_bias;
    if (saved[0].requires_grad()) {
      grad_x = at::empty_like(x, at::MemoryFormat::Contiguous);
      gemm({.a = const_matrix(grad), .b = const_matrix(weight).transposed(), .c = matrix(grad_x)}, torch_pool());
    }
    if (saved[1].requires_grad()) {
      grad_weight = at::empty_like(weight, at::MemoryFormat::Contiguous);
      gemm({.a = const_matrix(grad).transposed(),
            .b = const_matrix(x).transposed(),
            .as_bf16 = weight.scalar_type() == at::kBFloat16,
            .c = matrix(grad_weight)},
           torch_pool());
    }
    if (saved[2].defined() && saved[2].requires_grad()) grad_bias = grad.sum(0);
    return {grad_x, grad_weight, grad_bias};
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& x_TD, const at::Tensor& weight_ND, const at::Tensor& bias_N) {
  return LinearOp::apply(x_TD, weight_ND, if_defined(bias_N));
}

}  // namespace coterie
