// The parts of the experts one by one, for experts whose middle is not one of our activations: coterie::dispatch
// sorts choices by expert, coterie::grouped_linear multiplies each expert's rows, or those of its tokens, with its own
// matrix, and coterie::combine adds up what becomes of them.
#include <array>

#include "kernels/gemm.h"
#include "moe/combine.h"
#include "train/choice_order.h"
#include "train/packed_weights.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Wanted = std::array<bool, 3>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of x, weight and bias
constexpr const char* kOp = "coterie::grouped_linear";

void check_ids(const at::Tensor& expert_ids) {
  const at::ScalarType type = expert_ids.scalar_type();
  TORCH_CHECK_TYPE(type == at::kLong || type == at::kInt, "coterie::dispatch: expert_ids is ", type,
                   ", neither Long nor Int");
  check_axes(expert_ids, 2, "coterie::dispatch", "expert_ids");
}

// order [T*K]: choices t*K + k by expert, within an expert in their order, those of no expert last. offset [E+1]:
// those of expert e are order[offset[e] : offset[e + 1]].
std::tuple<at::Tensor, at::Tensor> dispatch_cpu(const at::Tensor& expert_ids, int64_t num_experts) {
  check_ids(expert_ids);
  const at::Tensor ids_TK = expert_ids.to(at::kLong).contiguous();
  const Dispatch dispatch =
      make_dispatch(ids_TK.const_data_ptr<int64_t>(), nullptr, ids_TK.size(0), ids_TK.size(1), num_experts);
  const at::Tensor order = at::empty({ids_TK.numel()}, at::kLong), offset = at::empty({num_experts + 1}, at::kLong);
  auto* next = std::copy(dispatch.choice_R.begin(), dispatch.choice_R.end(), order.mutable_data_ptr<int64_t>());
  for (size_t choice = 0; choice < dispatch.row_TK.size(); ++choice) {
    if (dispatch.row_TK[choice] < 0) *next++ = static_cast<int64_t>(choice);
  }
  std::copy(dispatch.offset_E1.begin(), dispatch.offset_E1.end(), offset.mutable_data_ptr<int64_t>());
  return {order, offset};
}

std::tuple<at::Tensor, at::Tensor> dispatch_meta(const at::Tensor& expert_ids, int64_t num_experts) {
  check_ids(expert_ids);
  const at::TensorOptions options = expert_ids.options().dtype(at::kLong);
  return {at::empty_symint({expert_ids.sym_numel()}, options), at::empty_symint({num_experts + 1}, options)};
}

void check(const at::Tensor& x, const at::Tensor& offset, const at::Tensor& weight, const OptionalTensor& bias,
           const OptionalTensor& order) {
  check_floating(x, kOp, "x");
  check_floating(weight, kOp, "weight");
  check_axes(x, 2, kOp, "x");
  check_axes(weight, 3, kOp, "weight");
  check_size(x, 1, weight.sym_size(2), kOp, "x");
  TORCH_CHECK_TYPE(offset.scalar_type() == at::kLong, kOp, ": offset is ", offset.scalar_type(), ", not Long");
  check_axes(offset, 1, kOp, "offset");
  check_size(offset, 0, weight.sym_size(0) + 1, kOp, "offset");
  if (given(order)) check_order(*order, kOp);
  if (!given(bias)) return;
  check_floating(*bias, kOp, "bias");
  check_axes(*bias, 2, kOp, "bias");
  check_size(*bias, 0, weight.sym_size(0), kOp, "bias");
  check_size(*bias, 1, weight.sym_size(1), kOp, "bias");
}

// An expert's rows, as views of anything that has rows [R, C]; those of x may be tokens, to be gathered.
struct Groups {
  at::Tensor offset;
  int64_t E, num_rows;
  const int64_t* data;
  std::optional<Dispatch> choices;

  Groups(const at::Tensor& offsets, const at::Tensor& x, const OptionalTensor& order)
      : offset(offsets.contiguous()), E(offset.numel() - 1), num_rows(given(order) ? order->numel() : x.size(0)) {
    if (given(order)) choices = dispatch_of_order(*order, x.size(0), nullptr, kOp);
    data = offset.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < E; ++e) {
      TORCH_CHECK_VALUE(data[e] >= 0 && data[e] <= data[e + 1], kOp, ": offset falls at ", e);
    }
    TORCH_CHECK_VALUE(data[E] <= num_rows, kOp, ": offset ends at ", data[E], ", after the ", num_rows, " rows of x");
  }
  int64_t count(int64_t e) const { return data[e + 1] - data[e]; }
  const int32_t* tokens(int64_t e) const { return choices ? choices->token_R.data() + data[e] : nullptr; }
  template <typename M>
  M rows(const M& matrix, int64_t e) const {
    return matrix.row_range(data[e], count(e));
  }
  // Rows of no expert are zeros.
  void clear_rest(const at::Tensor& rows) const {
    rows.narrow(0, 0, data[0]).zero_();
    rows.narrow(0, data[E], num_rows - data[E]).zero_();
  }
};

// Whether [E, N, D] is the view of a contiguous [E, D, N].
bool is_transposed(const at::Tensor& weight) {
  return !weight.is_contiguous() && weight.transpose(1, 2).is_contiguous();
}

template <typename Fill>
void for_experts(int64_t num_experts, const Fill& fill) {
  std::vector<GemmProblem> problems(static_cast<size_t>(num_experts));
  for (int64_t e = 0; e < num_experts; ++e) fill(problems[static_cast<size_t>(e)], e);
  grouped_gemm(problems, torch_pool());
}

at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& offset, const at::Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& order) {
  check(x, offset, weight, bias, order);
  const Groups groups(offset, x, order);
  const at::Tensor y = pooled_empty({groups.num_rows, weight.size(1)}, x.scalar_type()), bias_EN = as_float(bias);
  groups.clear_rest(y);
  const auto panels = packed_weight(weight);
  for_experts(groups.E, [&](GemmProblem& p, int64_t e) {
    p.a = groups.choices ? const_matrix(x) : groups.rows(const_matrix(x), e);
    p.gather_M = groups.tokens(e);
    p.num_gathered = groups.count(e);
    if (panels) {
      p.packed_b = panels->matrices() + e;
    } else {
      p.b = const_matrix(weight, e);
    }
    p.c = groups.rows(matrix(y), e);
    if (bias_EN.defined()) p.bias_N = bias_EN.const_data_ptr<float>() + e * weight.size(1);
  });
  return y;
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& offset, const at::Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& order) {
  check(x, offset, weight, bias, order);
  return at::empty_symint({(given(order) ? *order : x).sym_size(0), weight.sym_size(1)}, x.options());
}

// The gradient has the layout of the weight, [E, N, D] or, where that is a transposed view, [E, D, N] in memory: one
// product or its transpose.
at::Tensor weight_gradient(const Groups& groups, const at::Tensor& grad, const at::Tensor& x,
                           const at::Tensor& weight) {
  const bool transposed = is_transposed(weight);
  const at::Tensor stored = gradient_of(transposed ? weight.transpose(1, 2) : weight, true);
  for_experts(groups.E, [&](GemmProblem& p, int64_t e) {
    const ConstMatrix grad_N = groups.rows(const_matrix(grad), e).transposed();
    const ConstMatrix x_D = (groups.choices ? const_matrix(x) : groups.rows(const_matrix(x), e)).transposed();
    p.a = transposed ? x_D : grad_N;
    p.b = transposed ? grad_N : x_D;
    (transposed ? p.a_gather_K : p.b_gather_K) = groups.tokens(e);
    p.panels = dtype_of(weight);
    p.c = matrix(stored.select(0, e));
  });
  return transposed ? stored.transpose(1, 2) : stored;
}

// Of tokens the sum over their choices, in fp32.
at::Tensor input_gradient(const Groups& groups, const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor grad_x = gradient_of(x, true);
  const at::Tensor of_rows = groups.choices ? pooled_empty({groups.num_rows, x.size(1)}, at::kFloat) : grad_x;
  groups.clear_rest(of_rows);
  for_experts(groups.E, [&](GemmProblem& p, int64_t e) {
    p.a = groups.rows(const_matrix(grad), e);
    p.b = const_matrix(weight, e).transposed();
    p.c = groups.rows(matrix(of_rows), e);
  });
  if (!groups.choices) return grad_x;
  combine(*groups.choices, of_rows.const_data_ptr<float>(), /*unweighted=*/true, matrix(grad_x), torch_pool());
  return grad_x;
}

Gradients backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& offset,
                       const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& order,
                       Wanted wanted) {
  const Groups groups(offset, x, order);
  const at::Tensor grad = grad_y.contiguous();
  const at::Tensor grad_x = wanted[0] ? input_gradient(groups, grad, x, weight) : gradient_of(x, false);
  const at::Tensor grad_weight = wanted[1] ? weight_gradient(groups, grad, x, weight) : gradient_of(weight, false);
  const at::Tensor grad_bias = gradient_of(bias.value_or(weight), wanted[2]);
  for (int64_t e = 0; wanted[2] && e < groups.E; ++e) {
    grad_bias[e] = grad.slice(0, groups.data[e], groups.data[e + 1]).sum(0, false, at::kFloat);
  }
  return {grad_x, grad_weight, grad_bias};
}

Gradients backward_meta(const at::Tensor& /*grad*/, const at::Tensor& x, const at::Tensor& /*offset*/,
                        const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& /*order*/,
                        Wanted wanted) {
  const at::Tensor grad_weight =
      wanted[1] && is_transposed(weight)
          ? at::empty_symint({weight.sym_size(0), weight.sym_size(2), weight.sym_size(1)}, weight.options())
                .transpose(1, 2)
          : meta_gradient_of(weight, wanted[1], weight);
  return {meta_gradient_of(x, wanted[0], x), grad_weight,
          meta_gradient_of(wanted[2] ? bias : std::nullopt, wanted[2], weight)};
}

const auto& op() {
  static const auto handle = find_op<decltype(forward_cpu)>("coterie::grouped_linear");
  return handle;
}

struct GroupedLinearFunction : torch::autograd::Function<GroupedLinearFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& offset,
                            const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& order) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, offset, weight, bias.value_or(at::Tensor()), order.value_or(at::Tensor())});
    return op().call(x, offset, weight, bias, order);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const variable_list saved = context->get_saved_variables();
    const std::vector<bool> wanted = wanted_gradients(*context, saved);
    static const auto backward_op = find_op<decltype(backward_cpu)>("coterie::grouped_linear_backward");
    auto [grad_x, grad_weight, grad_bias] =
        backward_op.call(grads[0], saved[0], saved[1], saved[2], if_defined(saved[3]), if_defined(saved[4]),
                         {wanted[0], wanted[2], wanted[3]});
    return wanted_only({grad_x, at::Tensor(), grad_weight, grad_bias, at::Tensor()}, wanted);
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& offset, const at::Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& order) {
  if (wants_graph({x, weight, bias})) return GroupedLinearFunction::apply(x, offset, weight, bias, order);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op().call(x, offset, weight, bias, order);
}

at::Tensor forward_autocast(const at::Tensor& x, const at::Tensor& offset, const at::Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& order) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return op().call(autocast(x), offset, autocast(weight), autocast(bias), order);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(coterie, m) {
  m.def("dispatch(Tensor expert_ids, int num_experts) -> (Tensor order, Tensor offset)");
  m.def("grouped_linear(Tensor x, Tensor offset, Tensor weight, Tensor? bias=None, Tensor? order=None) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor grad, Tensor x, Tensor offset, Tensor weight, Tensor? bias, Tensor? order, "
      "bool[3] wanted) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("dispatch", dispatch_cpu);
  m.impl("grouped_linear", forward_cpu);
  m.impl("grouped_linear_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(coterie, Meta, m) {
  m.impl("dispatch", dispatch_meta);
  m.impl("grouped_linear", forward_meta);
  m.impl("grouped_linear_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(coterie, Autograd, m) {
  m.impl("grouped_linear", forward_autograd);
  m.impl("grouped_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(coterie, AutocastCPU, m) { m.impl("grouped_linear", forward_autocast); }

}  // namespace coterie
