#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <vector>

#include "kernels/causal_attention.h"
#include "kernels/rope.h"
#include "train/ops.h"
#include "train/pooled_tensor.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rotates queries and keys in place. A rotation is orthogonal: its gradient is the rotation by the opposite angle.
void rotate(const at::Tensor& qkv_TC, const CausalShape& shape, double theta, float direction) {
  std::vector<float> inverse_frequency(static_cast<size_t>(shape.d / 2));
  for (size_t i = 0; i < inverse_frequency.size(); ++i) {
    inverse_frequency[i] = direction * static_cast<float>(std::pow(theta, -2.0 * i / static_cast<double>(shape.d)));
  }
  rope_sequences(matrix(qkv_TC), shape.S, inverse_frequency.data(), shape.H + shape.G, shape.d, torch_pool());
}

struct AttentionOp : torch::autograd::Function<AttentionOp> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& qkv, const CausalShape& shape, double theta) {
    at::Tensor rotated = qkv;
    if (theta > 0) {
      rotated = pooled_empty(qkv.sizes(), qkv.scalar_type());
      rotated.copy_(qkv);
      rotate(rotated, shape, theta, 1.0f);
    }
    const at::Tensor out = pooled_empty({qkv.size(0), shape.H * shape.d}, qkv.scalar_type());
    const at::Tensor logsumexp_BHS = at::empty({shape.B, shape.H, shape.S}, at::kFloat);
    causal_attention(shape, const_matrix(rotated), matrix(out), logsumexp_BHS.mutable_data_ptr<float>(), torch_pool());
    context->save_for_backward({rotated, logsumexp_BHS});
    context->saved_data["shape"] = std::vector<int64_t>{shape.B, shape.S, shape.H, shape.G, shape.d};
    context->saved_data["theta"] = theta;
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const std::vector<int64_t> s = context->saved_data["shape"].toIntVector();
    const CausalShape shape{.B = s[0], .S = s[1], .H = s[2], .G = s[3], .d = s[4]};
    const double theta = context->saved_data["theta"].toDouble();
    const at::Tensor grad_out = grads[0].contiguous();
    const at::Tensor grad = pooled_empty(saved[0].sizes(), saved[0].scalar_type());
    causal_attention_backward(shape, const_matrix(saved[0]), saved[1].const_data_ptr<float>(), const_matrix(grad_out),
                              matrix(grad), torch_pool());
    if (theta > 0) rotate(grad, shape, theta, -1.0f);
    return {grad, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor causal_attention(const at::Tensor& qkv_TC, const CausalShape& shape, double theta) {
  return AttentionOp::apply(qkv_TC.contiguous(), shape, theta);
}

}  // namespace coterie
