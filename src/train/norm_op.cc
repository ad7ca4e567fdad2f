#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>

#include "kernels/kernel_table.h"
#include "kernels/norm.h"
#include "kernels/parallel_rows.h"
#include "train/ops.h"
#include "train/pooled_tensor.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::array kOnes = {1.0f, 1.0f};

at::Tensor fresh(const at::Tensor& x) { return pooled_empty(x.sizes(), at::kFloat); }

// Row by row, so that the sum is still in the cache when it is normalised.
void add_and_normalize(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& bias,
                       const NormSettings& settings, const at::Tensor& sum, const at::Tensor& normed) {
  const KernelTable& kernels = active_kernels();
  const int64_t D = x.size(1);
  const float *x_TD = x.const_data_ptr<float>(), *weight_D = weight.const_data_ptr<float>();
  const float *y_TD = float_data(y), *bias_D = float_data(bias);
  float* const normed_TD = normed.mutable_data_ptr<float>();
  float* const sum_TD = y_TD ? sum.mutable_data_ptr<float>() : nullptr;
  parallel_rows(x.size(0), 2 * D, torch_pool(), [&](int64_t t) {
    const float* row = x_TD + t * D;
    if (y_TD) {
      const std::array terms = {row, y_TD + t * D};
      kernels.combine_rows(terms.data(), kOnes.data(), 2, sum_TD + t * D, DType::kF32, D);
      row = sum_TD + t * D;
    }
    if (settings.kind == NormKind::kRmsNorm) {
      kernels.rms_norm_row(row, weight_D, settings.eps, D, normed_TD + t * D);
    } else {
      kernels.layer_norm_row(row, weight_D, bias_D, settings.eps, D, normed_TD + t * D);
    }
  });
}

struct AddNormOp : torch::autograd::Function<AddNormOp> {
  // y and bias may be undefined; without y, the sum is x and no result.
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const std::optional<at::Tensor>& y,
                               const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const NormSettings& settings) {
    context->set_materialize_grads(false);
    const at::Tensor normed = fresh(x), sum = y ? fresh(x) : x, none;
    add_and_normalize(x, y.value_or(none), weight, bias.value_or(none), settings, sum, normed);
    context->save_for_backward({sum, weight});
    context->saved_data["adds"] = y.has_value();
    context->saved_data["bias"] = bias.has_value();
    context->saved_data["layer_norm"] = settings.kind == NormKind::kLayerNorm;
    context->saved_data["eps"] = double{settings.eps};
    return y ? variable_list{normed, sum} : variable_list{normed};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const bool adds = context->saved_data["adds"].toBool(), biased = context->saved_data["bias"].toBool();
    const at::Tensor none, residual = adds && grads[1].defined() ? grads[1].contiguous() : none;
    if (!grads[0].defined()) return {residual, adds ? residual : none, none, none, none};
    const at::Tensor grad = grads[0].contiguous(), grad_x = fresh(grad), grad_weight = at::empty_like(saved[1]);
    const at::Tensor grad_bias = biased ? at::empty_like(saved[1]) : none;
    const NormBackward norm{.x_TD = saved[0].const_data_ptr<float>(),
                            .weight_D = saved[1].const_data_ptr<float>(),
                            .grad_TD = grad.const_data_ptr<float>(),
                            .residual_TD = float_data(residual),
                            .eps = static_cast<float>(context->saved_data["eps"].toDouble()),
                            .T = grad.size(0),
                            .D = grad.size(1),
                            .grad_x_TD = grad_x.mutable_data_ptr<float>(),
                            .grad_weight_D = grad_weight.mutable_data_ptr<float>(),
                            .grad_bias_D = biased ? grad_bias.mutable_data_ptr<float>() : nullptr};
    context->saved_data["layer_norm"].toBool() ? layer_norm_backward(norm, torch_pool())
                                               : rms_norm_backward(norm, torch_pool());
    return {grad_x, adds ? grad_x : none, grad_weight, grad_bias, none};
  }
};

}  // namespace

Normalized add_norm(const at::Tensor& x_TD, const at::Tensor& y_TD, const at::Tensor& weight_D,
                    const at::Tensor& bias_D, const NormSettings& settings) {
  const at::Tensor x = x_TD.contiguous(), y = y_TD.defined() ? y_TD.contiguous() : at::Tensor();
  const variable_list out = AddNormOp::apply(x, if_defined(y), weight_D, if_defined(bias_D), settings);
  return {y.defined() ? out[1] : x, out[0]};
}

at::Tensor rms_norm(const at::Tensor& x_TD, const at::Tensor& weight_D, double eps) {
  return add_norm(x_TD, {}, weight_D, {}, {NormKind::kRmsNorm, static_cast<float>(eps)}).normed_TD;
}

}  // namespace coterie
