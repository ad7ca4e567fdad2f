#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>
#include <vector>

#include "train/ops.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A C++ object that rides along in an AutogradContext.
template <typename T>
struct Holder : torch::CustomClassHolder {
  explicit Holder(T value) : value(std::move(value)) {}
  T value;
};

template <typename T>
void hold(AutogradContext* context, T value) {
  context->saved_data["state"] = c10::IValue::make_capsule(c10::make_intrusive<Holder<T>>(std::move(value)));
}

template <typename T>
T& held(AutogradContext* context) {
  return static_cast<Holder<T>*>(context->saved_data["state"].toCapsule().get())->value;
}

struct RouteState {
  RouterConfig config;
  std::shared_ptr<Routing> routing;
};

struct RouteOp : torch::autograd::Function<RouteOp> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits, const RouterConfig& config,
                            std::shared_ptr<Routing> routing) {
    const at::Tensor weights = at::empty({logits.size(0), routing->top_k}, logits.options());
    std::copy(routing->weights_TK.begin(), routing->weights_TK.end(), weights.mutable_data_ptr<float>());
    hold(context, RouteState{config, std::move(routing)});
    return weights;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const RouteState& state = held<RouteState>(context);
    const at::Tensor grad = grads[0].contiguous();
    const at::Tensor grad_logits = at::empty({grad.size(0), state.config.num_experts}, grad.options());
    route_backward(state.config, *state.routing, grad.const_data_ptr<float>(), nullptr,
                   grad_logits.mutable_data_ptr<float>(), torch_pool());
    return {grad_logits, at::Tensor(), at::Tensor()};
  }
};

struct ExpertsState {
  ExpertShape shape;
  std::shared_ptr<const Dispatch> dispatch;
  ExpertsContext context;
};

ExpertWeights weights_of(const ExpertTensors& tensors) {
  return {.up_EUD = tensors.up_EUD.const_data_ptr(),
          .down_EDF = tensors.down_EDF.const_data_ptr(),
          .up_bias_EU = float_data(tensors.up_bias_EU),
          .down_bias_ED = float_data(tensors.down_bias_ED),
          .dtype = dtype_of(tensors.up_EUD)};
}

struct ExpertsOp : torch::autograd::Function<ExpertsOp> {
  // Inputs that a gradient may be asked for, in the order of forward's arguments.
  enum Input { kX, kWeights, kUp, kUpBias, kDown, kDownBias, kNumInputs };

  using Optional = std::optional<at::Tensor>;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Optional& weights_TK,
                            const at::Tensor& up, const Optional& up_bias, const at::Tensor& down,
                            const Optional& down_bias, const ExpertShape& shape,
                            std::shared_ptr<const Dispatch> dispatch) {
    ExpertsState state{shape, std::move(dispatch), {}};
    const at::Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
    const ExpertTensors tensors{up, up_bias.value_or(at::Tensor()), down, down_bias.value_or(at::Tensor())};
    experts_forward(shape, weights_of(tensors), *state.dispatch, const_matrix(x), matrix(out), &state.context,
                    torch_pool());
    context->save_for_backward(
        {x, weights_TK.value_or(at::Tensor()), up, tensors.up_bias_EU, down, tensors.down_bias_ED});
    hold(context, std::move(state));
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list inputs = context->get_saved_variables();
    ExpertsState& state = held<ExpertsState>(context);
    const at::Tensor grad_out = grads[0].contiguous();
    variable_list out(kNumInputs + 2);  // two more arguments without gradients
    const auto wanted = [&](Input input) -> void* {
      if (!inputs[input].defined() || !inputs[input].requires_grad()) return nullptr;
      out[input] = at::empty_like(inputs[input], at::MemoryFormat::Contiguous);
      return out[input].mutable_data_ptr();
    };
    std::vector<float> grad_weight_R;
    ExpertGradients gradients{.grad_x_TD = wanted(kX),
                              .grad_up_EUD = wanted(kUp),
                              .grad_down_EDF = wanted(kDown),
                              .grad_up_bias_EU = static_cast<float*>(wanted(kUpBias)),
                              .grad_down_bias_ED = static_cast<float*>(wanted(kDownBias)),
                              .grad_weight_R = nullptr};
    auto* grad_weights_TK = static_cast<float*>(wanted(kWeights));
    if (grad_weights_TK) {
      grad_weight_R.resize(static_cast<size_t>(state.dispatch->num_rows()));
      gradients.grad_weight_R = grad_weight_R.data();
    }
    experts_backward(state.shape, weights_of({inputs[kUp], inputs[kUpBias], inputs[kDown], inputs[kDownBias]}),
                     *state.dispatch, const_matrix(inputs[kX]), const_matrix(grad_out), state.context, gradients,
                     torch_pool());
    if (grad_weights_TK) {
      out[kWeights].zero_();
      for (size_t r = 0; r < grad_weight_R.size(); ++r) grad_weights_TK[state.dispatch->choice_R[r]] = grad_weight_R[r];
    }
    return out;
  }
};

}  // namespace

Routed route_tokens(const RouterConfig& config, const at::Tensor& logits_TE, const RouteOptions& options) {
  const at::Tensor logits = logits_TE.contiguous();
  auto routing =
      std::make_shared<Routing>(route(config, logits.const_data_ptr<float>(), logits.size(0), options, torch_pool()));
  return {RouteOp::apply(logits, config, routing), routing};
}

at::Tensor apply_experts(const ExpertShape& shape, std::shared_ptr<const Dispatch> dispatch, const at::Tensor& x_TD,
                         const at::Tensor& weights_TK, const ExpertTensors& tensors) {
  return ExpertsOp::apply(x_TD.contiguous(), if_defined(weights_TK), tensors.up_EUD, if_defined(tensors.up_bias_EU),
                          tensors.down_EDF, if_defined(tensors.down_bias_ED), shape, std::move(dispatch));
}

}  // namespace coterie
