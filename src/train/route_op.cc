#include "coterie/error.h"
#include "kernels/parallel_rows.h"
#include "model/router_json.h"
#include "moe/router_random.h"
#include "train/ops.h"
#include "train/torch_op.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
// weights [T, K] fp32, expert_ids [T, K] int64 (dropped choices too), kept [T, K] bool, counts [E] int64 of kept
// choices, scores [T, E] fp32 for the backward pass.
using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Choices = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // the same without scores
constexpr const char* kOp = "coterie::route";
constexpr const char* kJitterOp = "coterie::jitter_factors";

RouterConfig parsed_config(const std::string& json) {
  try {
    return router_from_json(json);
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_VALUE(false, kOp, ": ", error.what());
  }
}

// Layer after layer says the same, and to read it takes as long as to route a few tokens.
RouterConfig config_of(std::string_view json) {
  static thread_local std::pair<std::string, RouterConfig> last;
  if (last.first != json) last = {std::string(json), parsed_config(std::string(json))};
  return last.second;
}

void check_key(const at::Tensor& key, const char* op) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, op, ": key is ", key.scalar_type(), ", not Long");
  check_axes(key, 1, op, "key");
  check_size(key, 0, 4, op, "key");
}

RouterConfig checked_config(const at::Tensor& logits, std::string_view json, const OptionalTensor& choice_bias,
                            const OptionalTensor& key) {
  const RouterConfig config = config_of(json);
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat, kOp, ": logits is ", logits.scalar_type(), ", not Float");
  check_axes(logits, 2, kOp, "logits");
  check_size(logits, 1, config.num_experts, kOp, "logits");
  TORCH_CHECK_VALUE(given(choice_bias) == config.choice_bias, kOp, ": choice_bias is ",
                    given(choice_bias) ? "given, but not in the configuration" : "missing");
  if (given(choice_bias)) {
    check_floating(*choice_bias, kOp, "choice_bias");
    check_axes(*choice_bias, 1, kOp, "choice_bias");
    check_size(*choice_bias, 0, config.num_experts, kOp, "choice_bias");
  }
  if (given(key)) check_key(*key, kOp);
  return config;
}

int64_t num_choices(const RouterConfig& config, bool training) {
  return training && config.chooser == Chooser::kExperts ? config.num_experts : config.top_k;
}

RandomKey key_of(const OptionalTensor& key) {
  if (!given(key)) return {};
  const at::Tensor values = key->contiguous();
  const auto* const k = values.const_data_ptr<int64_t>();
  return {static_cast<uint64_t>(k[0]), static_cast<uint64_t>(k[1]), k[2], k[3]};
}

// The factors [T, D] of the router's input that `jitter` draws for these tokens.
at::Tensor jitter_cpu(const at::Tensor& key, int64_t num_tokens, int64_t hidden_size, double epsilon) {
  check_key(key, kJitterOp);
  const RandomKey random = key_of(key);
  const at::Tensor factors_TD = pooled_empty({num_tokens, hidden_size}, at::kFloat);
  float* const factors = factors_TD.mutable_data_ptr<float>();
  parallel_rows(num_tokens, 8 * hidden_size, torch_pool(), [&](int64_t t) {
    jitter_factors(random, t, hidden_size, static_cast<float>(epsilon), factors + t * hidden_size);
  });
  return factors_TD;
}

at::Tensor jitter_meta(const at::Tensor& key, c10::SymInt num_tokens, c10::SymInt hidden_size, double /*epsilon*/) {
  check_key(key, kJitterOp);
  return at::empty_symint({std::move(num_tokens), std::move(hidden_size)}, key.options().dtype(at::kFloat));
}

template <typename To, typename From>
at::Tensor tensor_of(const std::vector<From>& values, at::IntArrayRef sizes) {
  const at::Tensor tensor = at::empty(sizes, c10::CppTypeToScalarType<To>::value);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<To>());
  return tensor;
}

template <typename To, typename From>
void fill(std::vector<To>& values, const at::Tensor& tensor) {
  const at::Tensor source = tensor.contiguous();
  const auto* const data = source.const_data_ptr<From>();
  values.assign(data, data + source.numel());
}

Result result_of(const RouterConfig& config, const at::Tensor& logits, const RouteOptions& options) {
  const at::Tensor logits_TE = logits.contiguous();
  const int64_t T = logits.size(0), E = config.num_experts;
  const Routing routing = route(config, logits_TE.const_data_ptr<float>(), T, options, torch_pool());
  return {tensor_of<float>(routing.weights_TK, {T, routing.top_k}),
          tensor_of<int64_t>(routing.expert_ids_TK, {T, routing.top_k}),
          tensor_of<bool>(routing.kept_TK, {T, routing.top_k}), tensor_of<int64_t>(routing.tokens_per_expert_E, {E}),
          tensor_of<float>(routing.scores_TE, {T, E})};
}

Result forward_cpu(const at::Tensor& logits, std::string_view json, const OptionalTensor& choice_bias,
                   const OptionalTensor& key, bool training) {
  const RouterConfig config = checked_config(logits, json, choice_bias, key);
  const at::Tensor bias_E = as_float(choice_bias);
  return result_of(config, logits, {.training = training, .key = key_of(key), .choice_bias_E = float_pointer(bias_E)});
}

Result forward_meta(const at::Tensor& logits, std::string_view json, const OptionalTensor& choice_bias,
                    const OptionalTensor& key, bool training) {
  const RouterConfig config = checked_config(logits, json, choice_bias, key);
  const c10::SymInt T = logits.sym_size(0), K = num_choices(config, training);
  const auto empty = [&](std::vector<c10::SymInt> sizes, at::ScalarType type) {
    return at::empty_symint(sizes, logits.options().dtype(type));
  };
  return {empty({T, K}, at::kFloat), empty({T, K}, at::kLong), empty({T, K}, at::kBool),
          empty({config.num_experts}, at::kLong), empty({T, logits.sym_size(1)}, at::kFloat)};
}

at::Tensor backward_cpu(const at::Tensor& grad_weights, const at::Tensor& expert_ids, const at::Tensor& kept,
                        const at::Tensor& scores, std::string_view json) {
  const RouterConfig config = config_of(json);
  Routing routing{.num_tokens = scores.size(0), .num_experts = config.num_experts, .top_k = expert_ids.size(1)};
  fill<int32_t, int64_t>(routing.expert_ids_TK, expert_ids);
  fill<uint8_t, bool>(routing.kept_TK, kept);
  fill<float, float>(routing.scores_TE, scores);
  const at::Tensor grad = grad_weights.contiguous(), grad_logits = at::empty(scores.sizes(), at::kFloat);
  route_backward(config, routing, grad.const_data_ptr<float>(), nullptr, grad_logits.mutable_data_ptr<float>(),
                 torch_pool());
  return grad_logits;
}

at::Tensor backward_meta(const at::Tensor& /*grad_weights*/, const at::Tensor& /*expert_ids*/,
                         const at::Tensor& /*kept*/, const at::Tensor& scores, std::string_view /*json*/) {
  return at::empty_symint(scores.sym_sizes(), scores.options());
}

const auto& forward_op() {
  static const auto op = find_op<decltype(forward_cpu)>("coterie::route_forward");
  return op;
}

Choices route_without_gradients(const at::Tensor& logits, std::string_view json, const OptionalTensor& choice_bias,
                                const OptionalTensor& key, bool training) {
  auto [weights, expert_ids, kept, counts, scores] = forward_op().call(logits, json, choice_bias, key, training);
  return {weights, expert_ids, kept, counts};
}

struct RouteFunction : torch::autograd::Function<RouteFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& logits, const std::string& json,
                               const OptionalTensor& choice_bias, const OptionalTensor& key, bool training) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return keep(context, json, forward_op().call(logits, json, choice_bias, key, training));
  }

  static variable_list keep(AutogradContext* context, const std::string& json, const Result& result) {
    const auto& [weights, expert_ids, kept, counts, scores] = result;
    context->save_for_backward({expert_ids, kept, scores});
    context->saved_data["config"] = json;
    context->mark_non_differentiable({expert_ids, kept, counts});
    return {weights, expert_ids, kept, counts};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const variable_list saved = context->get_saved_variables();
    static const auto op = find_op<decltype(backward_cpu)>("coterie::route_backward");
    variable_list gradients(5);
    gradients[0] = op.call(grads[0], saved[0], saved[1], saved[2], context->saved_data["config"].toStringRef());
    return gradients;
  }
};

// The same from C++, where ranks may share the experts' places.
struct RouteTokensFunction : torch::autograd::Function<RouteTokensFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& logits, const RouterConfig& config,
                               const RouteOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return RouteFunction::keep(context, router_to_json(config), result_of(config, logits, options));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list gradients = RouteFunction::backward(context, grads);
    gradients.resize(3);  // config and options have none
    return gradients;
  }
};

Choices route_autograd(const at::Tensor& logits, std::string_view json, const OptionalTensor& choice_bias,
                       const OptionalTensor& key, bool training) {
  if (wants_graph({logits})) {
    const variable_list out = RouteFunction::apply(logits, std::string(json), choice_bias, key, training);
    return {out[0], out[1], out[2], out[3]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return route_without_gradients(logits, json, choice_bias, key, training);
}

// What the choices say as a Routing; without the scores, which the op has kept for its backward pass.
Routing routing_of(const Choices& choices) {
  const auto& [weights, expert_ids, kept, counts] = choices;
  Routing routing{.num_tokens = kept.size(0), .num_experts = counts.size(0), .top_k = kept.size(1)};
  fill<int32_t, int64_t>(routing.expert_ids_TK, expert_ids);
  fill<float, float>(routing.weights_TK, weights.detach());
  fill<uint8_t, bool>(routing.kept_TK, kept);
  fill<int64_t, int64_t>(routing.tokens_per_expert_E, counts);
  return routing;
}

}  // namespace

Routed route_tokens(const RouterConfig& config, const at::Tensor& logits_TE, const RouteOptions& options) {
  const variable_list out = RouteTokensFunction::apply(logits_TE, config, options);
  const Choices choices{out[0], out[1], out[2], out[3]};
  const auto& [weights, expert_ids, kept, counts] = choices;
  return {weights, expert_ids.masked_fill(kept.logical_not(), -1), std::make_shared<Routing>(routing_of(choices))};
}

TORCH_LIBRARY_FRAGMENT(coterie, m) {
  m.def(
      "route(Tensor logits, str config, Tensor? choice_bias=None, Tensor? key=None, bool training=False) -> "
      "(Tensor weights, Tensor expert_ids, Tensor kept, Tensor counts)");
  m.def(
      "route_forward(Tensor logits, str config, Tensor? choice_bias, Tensor? key, bool training) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("route_backward(Tensor grad_weights, Tensor expert_ids, Tensor kept, Tensor scores, str config) -> Tensor");
  m.def("jitter_factors(Tensor key, SymInt num_tokens, SymInt hidden_size, float epsilon) -> Tensor");
}

TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("route", route_without_gradients);
  m.impl("route_forward", forward_cpu);
  m.impl("route_backward", backward_cpu);
  m.impl("jitter_factors", jitter_cpu);
}

TORCH_LIBRARY_IMPL(coterie, Meta, m) {
  m.impl("route", route_without_gradients);
  m.impl("route_forward", forward_meta);
  m.impl("route_backward", backward_meta);
  m.impl("jitter_factors", jitter_meta);
}

TORCH_LIBRARY_IMPL(coterie, Autograd, m) {
  m.impl("route", route_autograd);
  m.impl("route_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("route_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace coterie
