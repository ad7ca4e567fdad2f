#include "train/language_model.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "base/philox.h"
#include "comm/small_sums.h"
#include "coterie/error.h"
#include "io/printable.h"
#include "io/tensor_source.h"
#include "kernels/parallel_rows.h"
#include "model/tensors.h"
#include "train/parameter_part.h"
#include "train/torch_pool.h"

namespace coterie {
namespace {

double initial_std(const std::string& name, const ModelConfig& config) {
  const bool writes_residual = name.ends_with("o_proj.weight") || name.ends_with("down.weight");
  const double scale = writes_residual ? 1.0 / std::sqrt(2.0 * static_cast<double>(config.num_layers())) : 1.0;
  return config.initializer_range * scale;
}

at::Tensor initial_values(const TensorSpec& spec, const ModelConfig& config, uint64_t seed, size_t index) {
  if (spec.name.ends_with(".bias") || is_choice_bias(spec.name)) return at::zeros(spec.shape, at::kFloat);
  if (is_norm(spec.name)) return at::ones(spec.shape, at::kFloat);
  const auto bits = philox(seed, /*counter_high=*/0, index);
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{bits[0]} << 32 | bits[1]);
  return at::empty(spec.shape, at::kFloat).normal_(0.0, initial_std(spec.name, config), generator);
}

// x times the router's random factors of these tokens; the gradient passes through the product.
at::Tensor jittered(const at::Tensor& x_TD, float epsilon, const RandomKey& key) {
  const at::Tensor factors_TD = at::empty_like(x_TD, at::MemoryFormat::Contiguous);
  const int64_t D = x_TD.size(1);
  float* factors = factors_TD.mutable_data_ptr<float>();
  parallel_rows(x_TD.size(0), 8 * D, torch_pool(),
                [&](int64_t t) { jitter_factors(key, t, D, epsilon, factors + t * D); });
  return x_TD * factors_TD;
}

// A dense MLP as one expert that every token visits: its tensors lack the axis of experts.
at::Tensor dense_mlp(const at::Tensor& x_TD, const ExpertTensors& mlp, const ModelConfig& config) {
  const auto one = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.unsqueeze(0) : tensor; };
  return experts(x_TD, at::zeros({x_TD.size(0), 1}, at::kInt), {},
                 {one(mlp.up_EUD), one(mlp.up_bias_EU), one(mlp.down_EDF), one(mlp.down_bias_ED)}, config.activation,
                 config.gated_mlp);
}

void add_to(at::Tensor& total, const at::Tensor& term) { total = total.defined() ? total + term : term; }

}  // namespace

at::ScalarType parameter_type(const std::string& dtype) {
  if (dtype == "fp32") return at::kFloat;
  if (dtype == "bf16") return at::kBFloat16;
  throw InvalidArgument("dtype: '" + dtype + "' is neither fp32 nor bf16");
}

at::Tensor in_order(const at::Tensor& logical, const ElementOrder& order) {
  const auto [row, run] = order;
  if (row == 0) return logical.reshape({-1});
  return logical.reshape({logical.numel() / row, row / run, run}).transpose(0, 1).reshape({-1});
}

at::Tensor own_part(const Parameter& parameter, const at::Tensor& logical) {
  const at::Tensor& own = parameter.tensor;
  const at::Tensor part = in_order(logical, parameter.order).narrow(0, parameter.first_element, own.numel());
  return part.view(own.sizes());
}

LanguageModel::LanguageModel(const ModelConfig& config, at::ScalarType dtype, uint64_t seed, ProcessGroup* world,
                             const ExpertParallelSettings& parallel)
    : config_(config) {
  config_.validate("model");
  if (const std::string what = config_.untrainable(); !what.empty()) throw InvalidArgument("model: " + what);
  if (world) layout_ = ExpertLayout(*world, parallel, config_, static_cast<int64_t>(c10::elementSize(dtype)));
  for (const TensorSpec& spec : logical_tensors(config_)) {
    index_[spec.name] = parameters_.size();
    parameters_.push_back(make_parameter(spec, dtype, seed));
  }
  for (int64_t i = 0; i < config_.num_layers(); ++i) layers_.push_back(layer_named(i));
}

Parameter LanguageModel::make_parameter(const TensorSpec& spec, at::ScalarType dtype, uint64_t seed) const {
  const ExpertRanks* experts = layout_.layer(layer_of_experts(spec.name));
  const ParameterPart part = part_of(spec, config_, dtype == at::kBFloat16 ? DType::kBF16 : DType::kF32, experts);
  Parameter parameter{.name = spec.name,
                      .tensor = at::empty(part.shape, part.dtype == DType::kBF16 ? at::kBFloat16 : at::kFloat),
                      .logical_shape = spec.shape,
                      .order = part.order,
                      .first_element = part.first_element,
                      .replicas = experts ? experts->replicas : layout_.world()};
  parameter.tensor.copy_(own_part(parameter, initial_values(spec, config_, seed, parameters_.size())));
  parameter.tensor.set_requires_grad(part.trained);
  return parameter;
}

void LanguageModel::load(const TensorSource& source) {
  c10::NoGradGuard no_grad;
  for (const StoredTensor& stored : source.tensors()) {
    if (!index_.count(stored.name))
      throw InvalidArgument(source.path() + ": " + printable(stored.name) + ": not a tensor of this model");
  }
  for (const Parameter& parameter : parameters_) {
    const StoredTensor* stored = source.find(parameter.name);
    if (!stored) throw InvalidArgument(source.path() + ": " + parameter.name + ": missing");
    if (parameter.logical_shape != stored->shape) {
      throw InvalidArgument(source.path() + ": " + parameter.name + ": its shape is not the configuration's");
    }
    const at::Tensor values = at::empty(stored->shape, at::kFloat);
    source.read(parameter.name, values.mutable_data_ptr<float>());
    at::Tensor(parameter.tensor).copy_(own_part(parameter, values));
  }
}

at::Tensor LanguageModel::get(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? at::Tensor() : parameters_[found->second].tensor;
}

LanguageModel::Norm LanguageModel::norm_named(const std::string& prefix) const {
  return {get(prefix + ".weight"), get(prefix + ".bias")};
}

LanguageModel::Projection LanguageModel::projection_named(const std::string& prefix) const {
  return {get(prefix + ".weight"), get(prefix + ".bias")};
}

ExpertTensors LanguageModel::experts_named(const std::string& prefix) const {
  return {get(prefix + ".up.weight"), get(prefix + ".up.bias"), get(prefix + ".down.weight"),
          get(prefix + ".down.bias")};
}

LanguageModel::Layer LanguageModel::layer_named(int64_t index) const {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const std::string attention = prefix + "attention.";
  return {.input_norm = norm_named(prefix + "input_norm"),
          .post_attention_norm = norm_named(prefix + "post_attention_norm"),
          .q = projection_named(attention + "q_proj"),
          .k = projection_named(attention + "k_proj"),
          .v = projection_named(attention + "v_proj"),
          .o = projection_named(attention + "o_proj"),
          .q_norm = get(attention + "q_norm.weight"),
          .k_norm = get(attention + "k_norm.weight"),
          .mlp = experts_named(prefix + "mlp"),
          .experts = experts_named(prefix + "experts"),
          .router = get(prefix + "router.weight"),
          .choice_bias = get(prefix + "router.choice_bias"),
          .mix = projection_named(prefix + "mix")};
}

void LanguageModel::update_choice_biases(const std::vector<LoadCounter>& loads, double rate) const {
  size_t moe_layer = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (!config_.layers[i].is_moe()) continue;
    const LoadCounter& load = loads[moe_layer++];
    const at::Tensor& bias = layers_[i].choice_bias;
    if (bias.defined()) update_choice_bias(load.chosen_E(), static_cast<float>(rate), bias.mutable_data_ptr<float>());
  }
}

at::Tensor LanguageModel::head() const {
  return get(config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
}

ForwardResult LanguageModel::forward(const at::Tensor& tokens_BS, const ForwardOptions& options) const {
  ForwardResult result;
  at::Tensor x = embed(tokens_BS), y;  // the residual stream, and what the last block adds to it
  const auto normed = [&](const Norm& norm) {
    Normalized next = add_norm(x, y, norm.weight, norm.bias, {config_.norm, config_.norm_eps});
    x = next.sum_TD;
    return next.normed_TD;
  };
  for (int64_t i = 0; i < config_.num_layers(); ++i) {
    const Layer& layer = layers_[static_cast<size_t>(i)];
    y = attention(layer, normed(layer.input_norm), tokens_BS.size(1));
    y = feed_forward(config_.layers[static_cast<size_t>(i)], layer, normed(layer.post_attention_norm), i, options,
                     result);
  }
  result.hidden_TD = normed(norm_named("model.norm"));
  if (options.training) add_router_losses(options, result);
  return result;
}

at::Tensor LanguageModel::embed(const at::Tensor& tokens_BS) const {
  at::Tensor x = at::embedding(get("model.embed_tokens.weight"), tokens_BS.reshape({-1})).to(at::kFloat);
  if (config_.positions == PositionKind::kRope) return x;
  const at::Tensor positions = get("model.embed_positions.weight").narrow(0, 0, tokens_BS.size(1)).to(at::kFloat);
  return (x.view({tokens_BS.size(0), tokens_BS.size(1), -1}) + positions).view({-1, config_.hidden_size});
}

at::Tensor LanguageModel::attention(const Layer& layer, const at::Tensor& x, int64_t sequence_length) const {
  const CausalShape shape{.B = x.size(0) / sequence_length,
                          .S = sequence_length,
                          .H = config_.num_heads,
                          .G = config_.num_kv_heads,
                          .d = config_.head_dim};
  const at::ScalarType type = layer.q.weight.scalar_type();
  const bool changed = config_.qk_norm != QkNorm::kNone || config_.clip_qkv > 0;  // before a product rounds it
  const at::Tensor bias = layer.q.bias.defined() ? at::cat({layer.q.bias, layer.k.bias, layer.v.bias}) : at::Tensor();
  at::Tensor qkv =
      linear(x, at::cat({layer.q.weight, layer.k.weight, layer.v.weight}), bias, changed ? at::kFloat : type);
  if (config_.qk_norm != QkNorm::kNone) {
    const auto parts = qkv.split_with_sizes({shape.H * shape.d, shape.G * shape.d, shape.G * shape.d}, 1);
    const auto norm = [&](const at::Tensor& y, const at::Tensor& weight) {
      return rms_norm(y.reshape({-1, weight.size(0)}), weight, config_.norm_eps).view(y.sizes());
    };
    qkv = at::cat({norm(parts[0], layer.q_norm), norm(parts[1], layer.k_norm), parts[2]}, 1);
  }
  if (config_.clip_qkv > 0) qkv = qkv.clamp(-config_.clip_qkv, config_.clip_qkv);
  const double theta = config_.positions == PositionKind::kRope ? config_.rope_theta : 0.0;
  return linear(causal_attention(qkv.to(type), shape, theta), layer.o.weight, layer.o.bias, at::kFloat);
}

at::Tensor LanguageModel::feed_forward(const LayerConfig& layer_config, const Layer& layer, const at::Tensor& x,
                                       int64_t index, const ForwardOptions& options, ForwardResult& result) const {
  at::Tensor fixed;
  if (layer_config.intermediate_size > 0) {
    fixed = dense_mlp(x, layer.mlp, config_);
  }
  if (!layer_config.is_moe()) return fixed;
  const at::Tensor y = routed(layer_config, layer, x, index, options, result);
  switch (layer_config.residual) {
    case ResidualKind::kNone:
      return y;
    case ResidualKind::kSum:
      return fixed + y;
    case ResidualKind::kLearned: {
      const at::Tensor mix = at::softmax(at::linear(x, layer.mix.weight, layer.mix.bias), 1);
      return y * mix.narrow(1, 0, 1) + fixed * mix.narrow(1, 1, 1);
    }
    case ResidualKind::kSharedGate:
      return y + fixed * at::sigmoid(at::linear(x, layer.mix.weight));
  }
  return y;
}

at::Tensor LanguageModel::routed(const LayerConfig& layer_config, const Layer& layer, const at::Tensor& x,
                                 int64_t index, const ForwardOptions& options, ForwardResult& result) const {
  const RouterConfig& router = layer_config.router;
  const RandomKey key{.seed = options.seed, .step = options.step, .layer = index, .first_token = options.first_token};
  const bool jitter = options.training && router.jitter > 0;
  const at::Tensor logits = linear(jitter ? jittered(x, router.jitter, key) : x, layer.router, at::Tensor());
  const Routed chosen =
      route_tokens(router, logits,
                   {.training = options.training,
                    .key = key,
                    .choice_bias_E = layer.choice_bias.defined() ? layer.choice_bias.const_data_ptr<float>() : nullptr,
                    .world = layout_.world()});
  result.routings.push_back(chosen.routing);
  result.router_logits_TE.push_back(logits);
  const ExpertRanks* ranks = layout_.layer(index);
  if (ranks && ranks->group) {
    return experts_of_ranks(x, chosen.expert_ids_TK, chosen.weights_TK, layer.experts, config_.activation,
                            config_.gated_mlp, *ranks);
  }
  return experts(x, chosen.expert_ids_TK, chosen.weights_TK, layer.experts, config_.activation, config_.gated_mlp);
}

void LanguageModel::add_router_losses(const ForwardOptions& options, ForwardResult& result) const {
  BalanceCounts of_this_pass;
  BalanceCounts& counts = options.balance_counts ? *options.balance_counts : of_this_pass;
  count_choices_of_all_ranks(options, result, counts);
  size_t moe_layer = 0;
  for (const LayerConfig& layer : config_.layers) {
    if (!layer.is_moe()) continue;
    const at::Tensor& logits_TE = result.router_logits_TE[moe_layer];
    add_to(result.z_loss, z_loss(logits_TE));
    // Where experts choose, their load is even already.
    if (layer.router.chooser == Chooser::kTokens)
      add_to(result.balance_loss, balance_loss(logits_TE, counts[moe_layer]));
    ++moe_layer;
  }
}

// One message, whatever the number of layers.
void LanguageModel::count_choices_of_all_ranks(const ForwardOptions& options, const ForwardResult& result,
                                               BalanceCounts& counts) const {
  BalanceCounts own(result.routings.size());
  for (size_t i = 0; i < own.size(); ++i) count_choices(*result.routings[i], options.balance_choices, own[i]);
  sum_over_ranks(layout_.world(), {own.begin(), own.end()}, "load of the experts");
  counts.resize(own.size());
  for (size_t i = 0; i < own.size(); ++i) {
    counts[i].resize(own[i].size());
    std::transform(own[i].begin(), own[i].end(), counts[i].begin(), counts[i].begin(), std::plus<>());
  }
}

}  // namespace coterie
