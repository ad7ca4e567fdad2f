// Kernel views of torch tensors. The tensors must be on the CPU, fp32 or bf16.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "base/check.h"
#include "kernels/matrix.h"

namespace coterie {

inline DType dtype_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return DType::kF32;
  COTERIE_CHECK(tensor.scalar_type() == at::kBFloat16, "weights and activations are fp32 or bf16");
  return DType::kBF16;
}

inline ConstMatrix const_matrix(const at::Tensor& tensor) {
  COTERIE_CHECK(tensor.dim() == 2, "a matrix has two axes");
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.size(0),
          tensor.size(1),          tensor.stride(0), tensor.stride(1)};
}

// Matrix e of [E, N, K], any strides.
inline ConstMatrix const_matrix(const at::Tensor& tensor, int64_t e) {
  COTERIE_CHECK(tensor.dim() == 3, "matrices have three axes");
  const auto* const start = static_cast<const char*>(tensor.const_data_ptr());
  return {start + e * tensor.stride(0) * static_cast<int64_t>(tensor.itemsize()),
          dtype_of(tensor),
          tensor.size(1),
          tensor.size(2),
          tensor.stride(1),
          tensor.stride(2)};
}

inline Matrix matrix(const at::Tensor& tensor) {
  COTERIE_CHECK(tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), "rows are contiguous");
  return {tensor.mutable_data_ptr(), dtype_of(tensor), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

// Null for a bias that the model does not have.
inline const float* float_data(const std::optional<at::Tensor>& tensor) {
  return tensor && tensor->defined() ? tensor->const_data_ptr<float>() : nullptr;
}

// autograd::Function takes absent tensors as empty optionals, the model holds them as undefined ones.
inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

}  // namespace coterie
