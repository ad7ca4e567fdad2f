#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/norm.h"
#include "train/ops.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RmsNormOp : torch::autograd::Function<RmsNormOp> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, double eps) {
    const at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
    rms_norm(x.const_data_ptr<float>(), weight.const_data_ptr<float>(), static_cast<float>(eps), x.size(0), x.size(1),
             y.mutable_data_ptr<float>(), torch_pool());
    context->save_for_backward({x, weight});
    context->saved_data["eps"] = eps;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& x = saved[0];
    const at::Tensor grad = grads[0].contiguous();
    const at::Tensor grad_x = at::empty_like(grad), grad_weight = at::empty_like(saved[1]);
    rms_norm_backward(x.const_data_ptr<float>(), saved[1].const_data_ptr<float>(), grad.const_data_ptr<float>(),
                      static_cast<float>(context->saved_data["eps"].toDouble()), x.size(0), x.size(1),
                      grad_x.mutable_data_ptr<float>(), grad_weight.mutable_data_ptr<float>(), torch_pool());
    return {grad_x, grad_weight, at::Tensor()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x_TD, const at::Tensor& weight_D, double eps) {
  return RmsNormOp::apply(x_TD.contiguous(), weight_D, eps);
}

}  // namespace coterie
