#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "train/ops.h"
#include "train/torch_pool.h"

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

// Ids with -1 for a dropped choice, as the experts take them.
at::Tensor kept_ids(const Routing& routing) {
  const at::Tensor ids_TK = at::empty({routing.num_tokens, routing.top_k}, at::kInt);
  auto* const ids = ids_TK.mutable_data_ptr<int32_t>();
  for (size_t c = 0; c < routing.expert_ids_TK.size(); ++c) ids[c] = routing.kept_TK[c] ? routing.expert_ids_TK[c] : -1;
  return ids_TK;
}

}  // namespace

Routed route_tokens(const RouterConfig& config, const at::Tensor& logits_TE, const RouteOptions& options) {
  const at::Tensor logits = logits_TE.contiguous();
  auto routing =
      std::make_shared<Routing>(route(config, logits.const_data_ptr<float>(), logits.size(0), options, torch_pool()));
  return {RouteOp::apply(logits, config, routing), kept_ids(*routing), routing};
}

}  // namespace coterie
