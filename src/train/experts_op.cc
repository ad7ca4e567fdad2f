#include "moe/experts.h"

#include <array>

#include "coterie/error.h"
#include "moe/combine.h"
#include "train/ops.h"
#include "train/packed_weights.h"
#include "train/torch_op.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// out [T, D], and what the backward pass needs: slopes [T*K, U] (kernels/gemm.h) and inner [T*K, F], by routed rows.
using Kept = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
constexpr const char* kOp = "coterie::experts";

// The tensor arguments of the op, in its order.
struct Arguments {
  const at::Tensor& x_TD;
  const at::Tensor& expert_ids_TK;
  const OptionalTensor& weights_TK;
  const at::Tensor& up_EUD;
  const OptionalTensor& up_bias_EU;
  const at::Tensor& down_EDF;
  const OptionalTensor& down_bias_ED;
};
// Inputs that a gradient may be asked for, in the order of the backward op's results.
enum Input { kX, kWeights, kUp, kUpBias, kDown, kDownBias, kNumInputs };
using Wanted = std::array<bool, kNumInputs>;

void check_bias(const OptionalTensor& bias, const at::Tensor& weight, const char* argument) {
  if (!given(bias)) return;
  check_floating(*bias, kOp, argument);
  check_axes(*bias, 2, kOp, argument);
  check_size(*bias, 0, weight.sym_size(0), kOp, argument);
  check_size(*bias, 1, weight.sym_size(1), kOp, argument);
}

void check_choices(const Arguments& a) {
  const at::ScalarType ids = a.expert_ids_TK.scalar_type();
  TORCH_CHECK_TYPE(ids == at::kLong || ids == at::kInt, kOp, ": expert_ids is ", ids, ", neither Long nor Int");
  check_axes(a.expert_ids_TK, 2, kOp, "expert_ids");
  check_size(a.expert_ids_TK, 0, a.x_TD.sym_size(0), kOp, "expert_ids");
  const c10::SymInt K = a.expert_ids_TK.sym_size(1);
  TORCH_CHECK_VALUE(K <= kMostChoices, kOp, ": expert_ids has ", K, " choices a token, more than ", kMostChoices);
  if (!given(a.weights_TK)) return;
  check_floating(*a.weights_TK, kOp, "weights");
  check_axes(*a.weights_TK, 2, kOp, "weights");
  check_size(*a.weights_TK, 0, a.x_TD.sym_size(0), kOp, "weights");
  check_size(*a.weights_TK, 1, K, kOp, "weights");
}

Activation activation_of(std::string_view name) {
  try {
    return activation_from_name(name);
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_VALUE(false, kOp, ": ", error.what());
  }
}

void check(const Arguments& a, std::string_view activation, bool gated) {
  TORCH_CHECK_VALUE(gated || activation_of(activation) != Activation::kClampedSwiglu, kOp, ": activation: '",
                    activation, "' needs a gate");
  activation_of(activation);
  for (const auto& [tensor, name] : {std::pair(&a.x_TD, "x"), {&a.up_EUD, "up"}, {&a.down_EDF, "down"}}) {
    check_floating(*tensor, kOp, name);
    check_axes(*tensor, tensor == &a.x_TD ? 2 : 3, kOp, name);
  }
  TORCH_CHECK_TYPE(a.up_EUD.scalar_type() == a.down_EDF.scalar_type(), kOp, ": up is ", a.up_EUD.scalar_type(),
                   " and down is ", a.down_EDF.scalar_type());
  check_size(a.up_EUD, 2, a.x_TD.sym_size(1), kOp, "up");
  check_size(a.down_EDF, 0, a.up_EUD.sym_size(0), kOp, "down");
  check_size(a.down_EDF, 1, a.x_TD.sym_size(1), kOp, "down");
  check_size(a.up_EUD, 1, a.down_EDF.sym_size(2) * (gated ? 2 : 1), kOp, "up");
  check_bias(a.up_bias_EU, a.up_EUD, "up_bias");
  check_bias(a.down_bias_ED, a.down_EDF, "down_bias");
  check_choices(a);
}

// The arguments as the kernels take them: contiguous or in panels, biases and weights of choices in fp32.
struct Problem {
  ExpertShape shape;
  at::Tensor x_TD, up_EUD, down_EDF, up_bias_EU, down_bias_ED;
  Dispatch dispatch;
  std::shared_ptr<const WeightPanels> up_panels = nullptr, down_panels = nullptr;

  ExpertWeights weights() const {
    return {.up_EUD = up_EUD.const_data_ptr(),
            .down_EDF = down_EDF.const_data_ptr(),
            .up_bias_EU = float_pointer(up_bias_EU),
            .down_bias_ED = float_pointer(down_bias_ED),
            .dtype = dtype_of(up_EUD),
            .up_E = up_panels ? up_panels->matrices() : nullptr,
            .down_E = down_panels ? down_panels->matrices() : nullptr};
  }
};

Dispatch dispatch_of(const Arguments& a) {
  const at::Tensor ids_TK = a.expert_ids_TK.contiguous(), weights_TK = as_float(a.weights_TK);
  const int64_t T = ids_TK.size(0), K = ids_TK.size(1), E = a.up_EUD.size(0);
  const float* weights = float_pointer(weights_TK);
  return ids_TK.scalar_type() == at::kInt ? make_dispatch(ids_TK.const_data_ptr<int32_t>(), weights, T, K, E)
                                          : make_dispatch(ids_TK.const_data_ptr<int64_t>(), weights, T, K, E);
}

// `panels`: whether those that are kept will do.
Problem problem_of(const Arguments& a, std::string_view activation, bool gated, bool panels) {
  const auto up = panels ? packed_weight(a.up_EUD, gated) : nullptr;
  const auto down = panels ? packed_weight(a.down_EDF) : nullptr;
  return {.shape = {.num_experts = a.up_EUD.size(0),
                    .hidden_size = a.up_EUD.size(2),
                    .intermediate_size = a.down_EDF.size(2),
                    .activation = activation_of(activation),
                    .gated = gated},
          .x_TD = a.x_TD.contiguous(),
          .up_EUD = up ? a.up_EUD : a.up_EUD.contiguous(),
          .down_EDF = down ? a.down_EDF : a.down_EDF.contiguous(),
          .up_bias_EU = as_float(a.up_bias_EU),
          .down_bias_ED = as_float(a.down_bias_ED),
          .dispatch = dispatch_of(a),
          .up_panels = up,
          .down_panels = down};
}

// A view of memory that torch owns, for the length of a call.
AlignedBuffer borrowed(const at::Tensor& tensor) {
  return AlignedBuffer::borrowed(const_cast<void*>(tensor.const_data_ptr()), tensor.nbytes());
}

// Keeps nothing for a backward pass.
at::Tensor experts_cpu(const at::Tensor& x, const at::Tensor& ids, const OptionalTensor& weights, const at::Tensor& up,
                       const OptionalTensor& up_bias, const at::Tensor& down, const OptionalTensor& down_bias,
                       std::string_view activation, bool gated) {
  const Arguments arguments{x, ids, weights, up, up_bias, down, down_bias};
  check(arguments, activation, gated);
  const Problem p = problem_of(arguments, activation, gated, /*panels=*/true);
  const at::Tensor out = pooled_empty(x.sizes(), x.scalar_type());
  experts_forward(p.shape, p.weights(), p.dispatch, const_matrix(p.x_TD), matrix(out), nullptr, torch_pool());
  return out;
}

// The clamped gate serves models, its derivative is not there.
void check_differentiable(std::string_view activation) {
  TORCH_CHECK_VALUE(activation_of(activation) != Activation::kClampedSwiglu, kOp, ": activation: '", activation,
                    "' has no gradient");
}

Kept forward_cpu(const at::Tensor& x, const at::Tensor& ids, const OptionalTensor& weights, const at::Tensor& up,
                 const OptionalTensor& up_bias, const at::Tensor& down, const OptionalTensor& down_bias,
                 std::string_view activation, bool gated) {
  check_differentiable(activation);
  const Arguments arguments{x, ids, weights, up, up_bias, down, down_bias};
  check(arguments, activation, gated);
  const Problem p = problem_of(arguments, activation, gated, /*panels=*/true);
  const at::Tensor out = pooled_empty(x.sizes(), x.scalar_type());
  // In the weights' type, as the kernels keep them.
  const at::Tensor slopes = pooled_empty({ids.numel(), p.shape.up_rows()}, up.scalar_type());
  const at::Tensor inner = pooled_empty({ids.numel(), p.shape.intermediate_size}, up.scalar_type());
  ExpertsContext context{.slopes_RU = borrowed(slopes), .inner_RF = borrowed(inner)};
  experts_forward(p.shape, p.weights(), p.dispatch, const_matrix(p.x_TD), matrix(out), &context, torch_pool());
  return {out, slopes, inner};
}

Gradients backward_cpu(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& ids,
                       const OptionalTensor& weights, const at::Tensor& up, const OptionalTensor& up_bias,
                       const at::Tensor& down, const OptionalTensor& down_bias, const at::Tensor& slopes,
                       const at::Tensor& inner, std::string_view activation, bool gated, Wanted wanted) {
  const Problem p = problem_of({x, ids, weights, up, up_bias, down, down_bias}, activation, gated, /*panels=*/false);
  const at::Tensor grad = grad_out.contiguous(), kept_slopes = slopes.contiguous(), kept_inner = inner.contiguous();
  const ExpertsContext context{.slopes_RU = borrowed(kept_slopes), .inner_RF = borrowed(kept_inner)};
  const at::Tensor grad_x = gradient_of(x, wanted[kX]), grad_up = gradient_of(up, wanted[kUp]);
  const at::Tensor grad_down = gradient_of(down, wanted[kDown]);
  // These three come in fp32 and take the type of their argument at the end.
  const at::Tensor grad_up_bias = gradient_of(p.up_bias_EU, wanted[kUpBias]);
  const at::Tensor grad_down_bias = gradient_of(p.down_bias_ED, wanted[kDownBias]);
  const at::Tensor grad_weights = wanted[kWeights] ? at::zeros(ids.sizes(), at::kFloat) : at::empty({0}, at::kFloat);
  std::vector<float> grad_weight_R(wanted[kWeights] ? p.dispatch.choice_R.size() : 0);
  const auto pointer = [&](Input input, const at::Tensor& t) { return wanted[input] ? t.mutable_data_ptr() : nullptr; };
  const ExpertGradients gradients{.grad_x_TD = pointer(kX, grad_x),
                                  .grad_up_EUD = pointer(kUp, grad_up),
                                  .grad_down_EDF = pointer(kDown, grad_down),
                                  .grad_up_bias_EU = static_cast<float*>(pointer(kUpBias, grad_up_bias)),
                                  .grad_down_bias_ED = static_cast<float*>(pointer(kDownBias, grad_down_bias)),
                                  .grad_weight_R = wanted[kWeights] ? grad_weight_R.data() : nullptr};
  experts_backward(p.shape, p.weights(), p.dispatch, const_matrix(p.x_TD), const_matrix(grad), context, gradients,
                   torch_pool());
  auto* const grad_weights_TK = grad_weights.mutable_data_ptr<float>();
  for (size_t r = 0; r < grad_weight_R.size(); ++r) grad_weights_TK[p.dispatch.choice_R[r]] = grad_weight_R[r];
  const auto typed = [&](const at::Tensor& t, const OptionalTensor& argument) {
    return t.to(given(argument) ? argument->scalar_type() : x.scalar_type());
  };
  return {grad_x,    typed(grad_weights, weights),    grad_up, typed(grad_up_bias, up_bias),
          grad_down, typed(grad_down_bias, down_bias)};
}

at::Tensor experts_meta(const at::Tensor& x, const at::Tensor& ids, const OptionalTensor& weights, const at::Tensor& up,
                        const OptionalTensor& up_bias, const at::Tensor& down, const OptionalTensor& down_bias,
                        std::string_view activation, bool gated) {
  check({x, ids, weights, up, up_bias, down, down_bias}, activation, gated);
  return at::empty_symint(x.sym_sizes(), x.options());
}

Kept forward_meta(const at::Tensor& x, const at::Tensor& ids, const OptionalTensor& weights, const at::Tensor& up,
                  const OptionalTensor& up_bias, const at::Tensor& down, const OptionalTensor& down_bias,
                  std::string_view activation, bool gated) {
  check_differentiable(activation);
  const c10::SymInt rows = ids.sym_numel();
  return {experts_meta(x, ids, weights, up, up_bias, down, down_bias, activation, gated),
          at::empty_symint({rows, up.sym_size(1)}, up.options()),
          at::empty_symint({rows, down.sym_size(2)}, up.options())};
}

Gradients backward_meta(const at::Tensor& /*grad*/, const at::Tensor& x, const at::Tensor& /*ids*/,
                        const OptionalTensor& weights, const at::Tensor& up, const OptionalTensor& up_bias,
                        const at::Tensor& down, const OptionalTensor& down_bias, const at::Tensor& /*slopes*/,
                        const at::Tensor& /*inner*/, std::string_view /*activation*/, bool /*gated*/, Wanted wanted) {
  return {meta_gradient_of(x, wanted[kX], x),       meta_gradient_of(weights, wanted[kWeights], x),
          meta_gradient_of(up, wanted[kUp], x),     meta_gradient_of(up_bias, wanted[kUpBias], x),
          meta_gradient_of(down, wanted[kDown], x), meta_gradient_of(down_bias, wanted[kDownBias], x)};
}

const auto& experts_op() {
  static const auto op = find_op<decltype(experts_cpu)>("coterie::experts");
  return op;
}

struct ExpertsFunction : torch::autograd::Function<ExpertsFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& ids,
                            const OptionalTensor& weights, const at::Tensor& up, const OptionalTensor& up_bias,
                            const at::Tensor& down, const OptionalTensor& down_bias, const std::string& activation,
                            bool gated) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_op<decltype(forward_cpu)>("coterie::experts_forward");
    auto [out, slopes, inner] = op.call(x, ids, weights, up, up_bias, down, down_bias, activation, gated);
    const at::Tensor none;
    context->save_for_backward(
        {x, ids, weights.value_or(none), up, up_bias.value_or(none), down, down_bias.value_or(none), slopes, inner});
    context->saved_data["activation"] = activation;
    context->saved_data["gated"] = gated;
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const variable_list saved = context->get_saved_variables();
    const std::vector<bool> w = wanted_gradients(*context, {saved.begin(), saved.begin() + 7});
    static const auto op = find_op<decltype(backward_cpu)>("coterie::experts_backward");
    auto [grad_x, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias] =
        op.call(grads[0], saved[0], saved[1], if_defined(saved[2]), saved[3], if_defined(saved[4]), saved[5],
                if_defined(saved[6]), saved[7], saved[8], context->saved_data["activation"].toStringRef(),
                context->saved_data["gated"].toBool(), {w[0], w[2], w[3], w[4], w[5], w[6]});
    variable_list gradients =
        wanted_only({grad_x, at::Tensor(), grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias}, w);
    gradients.resize(9);  // activation and gated have none
    return gradients;
  }
};

at::Tensor experts_autograd(const at::Tensor& x, const at::Tensor& ids, const OptionalTensor& weights,
                            const at::Tensor& up, const OptionalTensor& up_bias, const at::Tensor& down,
                            const OptionalTensor& down_bias, std::string_view activation, bool gated) {
  if (wants_graph({x, weights, up, up_bias, down, down_bias})) {
    return ExpertsFunction::apply(x, ids, weights, up, up_bias, down, down_bias, std::string(activation), gated);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return experts_op().call(x, ids, weights, up, up_bias, down, down_bias, activation, gated);
}

// Weights of choices keep their type: they are few, and routers compute them in fp32 on purpose.
at::Tensor experts_autocast(const at::Tensor& x, const at::Tensor& ids, const OptionalTensor& weights,
                            const at::Tensor& up, const OptionalTensor& up_bias, const at::Tensor& down,
                            const OptionalTensor& down_bias, std::string_view activation, bool gated) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return experts_op().call(autocast(x), ids, weights, autocast(up), autocast(up_bias), autocast(down),
                           autocast(down_bias), activation, gated);
}

}  // namespace

at::Tensor experts(const at::Tensor& x_TD, const at::Tensor& expert_ids_TK, const at::Tensor& weights_TK,
                   const ExpertTensors& t, Activation activation, bool gated) {
  return experts_op().call(x_TD, expert_ids_TK, if_defined(weights_TK), t.up_EUD, if_defined(t.up_bias_EU), t.down_EDF,
                           if_defined(t.down_bias_ED), activation_name(activation), gated);
}

TORCH_LIBRARY_FRAGMENT(coterie, m) {
  m.def(
      "experts(Tensor x, Tensor expert_ids, Tensor? weights, Tensor up, Tensor? up_bias, Tensor down, "
      "Tensor? down_bias, str activation='silu', bool gated=True) -> Tensor");
  m.def(
      "experts_forward(Tensor x, Tensor expert_ids, Tensor? weights, Tensor up, Tensor? up_bias, Tensor down, "
      "Tensor? down_bias, str activation, bool gated) -> (Tensor, Tensor, Tensor)");
  m.def(
      "experts_backward(Tensor grad, Tensor x, Tensor expert_ids, Tensor? weights, Tensor up, Tensor? up_bias, "
      "Tensor down, Tensor? down_bias, Tensor slopes, Tensor inner, str activation, bool gated, bool[6] wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("experts", experts_cpu);
  m.impl("experts_forward", forward_cpu);
  m.impl("experts_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(coterie, Meta, m) {
  m.impl("experts", experts_meta);
  m.impl("experts_forward", forward_meta);
  m.impl("experts_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(coterie, Autograd, m) {
  m.impl("experts", experts_autograd);
  m.impl("experts_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("experts_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(coterie, AutocastCPU, m) { m.impl("experts", experts_autocast); }

}  // namespace coterie
