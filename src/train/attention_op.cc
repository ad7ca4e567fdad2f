#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <vector>

#include "kernels/rope.h"
#include "train/ops.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A rotation is orthogonal: its gradient is the rotation by the opposite angle.
void rotate_in_place(const at::Tensor& x, int64_t sequence_length, int64_t head_dim, double theta, float direction) {
  std::vector<int32_t> positions_T(static_cast<size_t>(x.size(0)));
  for (size_t t = 0; t < positions_T.size(); ++t) positions_T[t] = static_cast<int32_t>(t % sequence_length);
  std::vector<float> inverse_frequency(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < inverse_frequency.size(); ++i) {
    inverse_frequency[i] = direction * static_cast<float>(std::pow(theta, -2.0 * i / static_cast<double>(head_dim)));
  }
  rope(x.mutable_data_ptr<float>(), x.stride(0), positions_T.data(), inverse_frequency.data(), x.size(0),
       x.size(1) / head_dim, head_dim, torch_pool());
}

struct RotateOp : torch::autograd::Function<RotateOp> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t sequence_length, int64_t head_dim,
                            double theta) {
    context->saved_data["sequence_length"] = sequence_length;
    context->saved_data["head_dim"] = head_dim;
    context->saved_data["theta"] = theta;
    context->mark_dirty({x});
    rotate_in_place(x, sequence_length, head_dim, theta, 1.0f);
    return x;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor grad = grads[0].clone(at::MemoryFormat::Contiguous);
    rotate_in_place(grad, context->saved_data["sequence_length"].toInt(), context->saved_data["head_dim"].toInt(),
                    context->saved_data["theta"].toDouble(), -1.0f);
    return {grad, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor rotate(const at::Tensor& x, int64_t sequence_length, int64_t head_dim, double theta) {
  return RotateOp::apply(x, sequence_length, head_dim, theta);
}

at::Tensor causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t sequence_length,
                            int64_t head_dim) {
  // [T, heads * d] -> [B, heads, S, d]
  const auto heads_first = [&](const at::Tensor& x) {
    return x.view({-1, sequence_length, x.size(1) / head_dim, head_dim}).transpose(1, 2);
  };
  const at::Tensor out = at::scaled_dot_product_attention(
      heads_first(q), heads_first(k), heads_first(v), /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true,
      /*scale=*/std::nullopt, /*enable_gqa=*/q.size(1) != k.size(1));
  return out.transpose(1, 2).reshape({q.size(0), q.size(1)});
}

}  // namespace coterie
