// What the ops of coterie.torch share: checks of their arguments and the way to call an op from C++.
//
// Each op is registered in its own file as torch wants it: a schema, a CPU kernel over raw pointers, a meta
// kernel (shapes alone, for torch.compile), an autograd kernel that calls the op that keeps what the backward
// op needs, and an autocast kernel. Gradients that nobody asked for have the shape [0].
#pragma once

#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "train/pooled_tensor.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {

using OptionalTensor = std::optional<at::Tensor>;

// A typed handle of the op that Python calls torch.ops.coterie.NAME.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline void check_floating(const at::Tensor& tensor, const char* op, const char* argument) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, op, ": ", argument,
                   " is ", tensor.scalar_type(), ", neither Float nor BFloat16");
}

inline void check_axes(const at::Tensor& tensor, int64_t axes, const char* op, const char* argument) {
  TORCH_CHECK_VALUE(tensor.dim() == axes, op, ": ", argument, " has ", tensor.dim(), " axes instead of ", axes);
}

inline void check_size(const at::Tensor& tensor, int64_t axis, const c10::SymInt& size, const char* op,
                       const char* argument) {
  TORCH_CHECK_VALUE(tensor.sym_size(axis) == size, op, ": ", argument, " has ", tensor.sym_size(axis),
                    " entries along axis ", axis, " instead of ", size);
}

inline bool given(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

// fp32 and contiguous, as the kernels take biases and weights of choices; undefined when not given.
inline at::Tensor as_float(const OptionalTensor& tensor) {
  return given(tensor) ? tensor->to(at::kFloat).contiguous() : at::Tensor();
}

inline const float* float_pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

// The gradient of `of`, to be filled in; [0] when it is not wanted.
inline at::Tensor gradient_of(const at::Tensor& of, bool wanted) {
  if (wanted) return pooled_empty(of.sizes(), of.scalar_type());
  return at::empty({0}, of.defined() ? of.options() : at::TensorOptions(at::kFloat));
}

// The same for meta kernels.
inline at::Tensor meta_gradient_of(const OptionalTensor& of, bool wanted, const at::Tensor& like) {
  if (!wanted || !given(of)) return at::empty({0}, (given(of) ? *of : like).options());
  return at::empty_symint(of->sym_sizes(), of->options());
}

// Which of the inputs want a gradient, in the order of the arguments; `inputs` are all of forward's tensors, in
// their order (those that were not given take no part in autograd).
inline std::vector<bool> wanted_gradients(const torch::autograd::AutogradContext& context,
                                          const torch::autograd::variable_list& inputs) {
  std::vector<bool> wanted;
  size_t edge = 0;
  for (const at::Tensor& input : inputs) wanted.push_back(input.defined() && context.needs_input_grad(edge++));
  return wanted;
}

// Undefined where no gradient is wanted, as autograd expects it.
inline torch::autograd::variable_list wanted_only(torch::autograd::variable_list gradients,
                                                  const std::vector<bool>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) gradients[i] = at::Tensor();
  }
  return gradients;
}

// Our backward passes are not differentiable themselves: one clear line instead of a silent zero.
inline void check_first_derivative(const char* op) {
  TORCH_CHECK(!c10::GradMode::is_enabled(), op, ": has no second derivative (create_graph)");
}

// torch.func's transforms take no op that is differentiated in C++, and say so in words about code of the caller's.
inline void check_transforms() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "coterie's ops don't go through torch.func's transforms; inside coterie.torch.aten_ops() torch's own do");
  }
}

// Whether autograd is to see an op of these. Refuses tangents of forward-mode differentiation: no op passes them on,
// and to lose them would be a silent zero.
inline bool wants_graph(std::initializer_list<OptionalTensor> tensors) {
  bool any = false;
  for (const OptionalTensor& tensor : tensors) {
    if (!given(tensor)) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor->_fw_grad(0).defined(), "coterie's ops have no forward-mode derivative (jvp)");
    any = any || tensor->requires_grad();
  }
  const bool wanted = any && c10::GradMode::is_enabled();
  if (wanted) check_transforms();
  return wanted;
}

// Casts to the type of the autocast region that the CPU is in.
inline at::Tensor autocast(const at::Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), tensor, c10::DeviceType::CPU);
}
inline OptionalTensor autocast(const OptionalTensor& tensor) {
  return given(tensor) ? OptionalTensor(autocast(*tensor)) : std::nullopt;
}

}  // namespace coterie
