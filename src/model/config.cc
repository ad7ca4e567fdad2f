#include "model/config.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "coterie/error.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "model/architectures.h"
#include "model/config_reader.h"
#include "model/tensors.h"

namespace coterie {
namespace {

const Architecture& architecture_of(const ConfigReader& json) {
  const std::string& source = json.source();
  if (json.has("architectures")) {
    const nlohmann::json& names = json.value("architectures");
    if (!names.is_array() || names.size() != 1 || !names[0].is_string()) {
      json.fail("architectures", names.dump() + " is not a list of one name");
    }
    return architecture_named(names[0].get<std::string>(), source);
  }
  const std::string model_type = json.text("model_type");
  for (const Architecture* architecture : architectures()) {
    if (model_type == architecture->model_type) return *architecture;
  }
  json.fail("model_type", "'" + model_type + "' is not supported");
}

constexpr int64_t kMostPositions = int64_t{1} << 30;

// JSON has no words for numbers that are none.
std::string number_text(double value) {
  if (std::isfinite(value)) return Json(value).dump();
  return std::isnan(value) ? "nan" : value < 0 ? "-inf" : "inf";
}

// Throws "source: field: value ..." for what cannot be.
class Validator {
 public:
  explicit Validator(const std::string& source) : source_(source) {}

  [[noreturn]] void fail(const std::string& field, const std::string& what) const {
    throw InvalidArgument(source_ + ": " + field + ": " + what);
  }
  void size(const std::string& field, int64_t value, int64_t most = int64_t{1} << 24) const {
    if (value < 1 || value > most) fail(field, std::to_string(value) + " is not in [1, " + std::to_string(most) + "]");
  }
  void number(const std::string& field, double value, bool zero_allowed = false) const {
    constexpr double kMost = std::numeric_limits<float>::max();  // all are used in fp32
    if (!(std::abs(value) <= kMost)) fail(field, number_text(value) + " is not finite in fp32");
    if (value < 0 || (value == 0 && !zero_allowed)) {
      fail(field, number_text(value) + " is not " + (zero_allowed ? "zero or positive" : "positive"));
    }
  }

  void rope_factors(const std::string& field, const std::vector<double>& factors, int64_t wanted) const {
    if (static_cast<int64_t>(factors.size()) != wanted) {
      fail(field, std::to_string(factors.size()) + " numbers, not " + std::to_string(wanted));
    }
    for (const double factor : factors) number(field, factor);
  }

  void rotary(const ModelConfig& c) const {
    const int64_t dims = c.num_rotary_dims(), most = c.is_latent() ? c.latent.rope_dim : c.head_dim;
    if (c.rotary_dim != 0) size("rotary_dim", c.rotary_dim, most);
    const std::string field = c.rotary_dim != 0 ? "rotary_dim" : c.is_latent() ? "qk_rope_head_dim" : "head_dim";
    if (dims % 2 != 0) fail(field, std::to_string(dims) + " is odd, rotary positions need pairs");
    number("rope_theta", c.rope_theta);
    if (c.rope_scaling.kind == RopeScalingKind::kYarn && c.rope_theta <= 1) {
      fail("rope_theta", Json(c.rope_theta).dump() + " is not above 1, as yarn needs it");
    }
    rope_scaling(c.rope_scaling, dims);
    angles(c);
  }

  void rope_scaling(const RopeScaling& s, int64_t dims) const {
    const std::string prefix = "rope_scaling.";
    for (const auto& [key, value] : {std::pair("factor", s.factor),
                                     {"low_freq_factor", s.low_freq_factor},
                                     {"high_freq_factor", s.high_freq_factor},
                                     {"beta_fast", s.beta_fast},
                                     {"beta_slow", s.beta_slow}}) {
      number(prefix + key, value);
    }
    for (const auto& [key, value] : {std::pair("attention_factor", s.attention_factor),
                                     {"mscale", s.mscale},
                                     {"mscale_all_dim", s.mscale_all_dim},
                                     {"short_mscale", s.short_mscale},
                                     {"long_mscale", s.long_mscale}}) {
      number(prefix + key, value, /*zero_allowed=*/true);
    }
    using enum RopeScalingKind;
    if (s.kind == kDynamic || s.kind == kLlama3 || s.kind == kYarn || s.kind == kLongrope) {
      size(prefix + "original_max_position_embeddings", s.original_context, kMostPositions);
    }
    rope_factors(prefix + "factors", s.factors, s.kind == kFactors ? dims / 2 : 0);
    const int64_t num_longrope = s.kind == kLongrope ? dims / 2 : 0;
    rope_factors(prefix + "short_factor", s.short_factors, num_longrope);
    rope_factors(prefix + "long_factor", s.long_factors, num_longrope);
  }

  // A cosine of what fp32 does not hold would be NaN, and so would everything that follows.
  void angles(const ModelConfig& c) const {
    const RopeScaling& s = c.rope_scaling;
    const int64_t last = c.max_context();
    const auto check = [&](const std::string& field, int64_t length) {
      for (const float frequency : rope_frequencies(s, c.rope_theta, c.num_rotary_dims(), length)) {
        const float angle = static_cast<float>(last) * frequency;
        if (!std::isfinite(angle)) fail(field, "position " + std::to_string(last) + " turns by " + number_text(angle));
      }
    };
    if (s.kind == RopeScalingKind::kLongrope) {
      check("rope_scaling.short_factor", s.original_context);
      check("rope_scaling.long_factor", s.original_context + 1);
    } else {
      check(s.kind == RopeScalingKind::kNone ? "rope_theta" : "rope_scaling", last);
    }
  }

  void latent(const ModelConfig& c) const {
    const LatentAttention& l = c.latent;
    size("latent_attention.kv_lora_rank", l.kv_rank, 1 << 16);
    if (l.q_rank != 0) size("latent_attention.q_lora_rank", l.q_rank);
    size("latent_attention.qk_nope_head_dim", l.nope_dim, 1 << 16);
    size("latent_attention.qk_rope_head_dim", l.rope_dim, 1 << 16);
    size("latent_attention.v_head_dim", l.v_dim, 1 << 16);
    number("latent_attention.norm_eps", l.norm_eps);
    if (c.num_kv_heads != c.num_heads) {
      fail("num_key_value_heads", std::to_string(c.num_kv_heads) + " is not num_attention_heads (" +
                                      std::to_string(c.num_heads) + "), as latent attention needs it");
    }
    if (c.head_dim != l.nope_dim + l.rope_dim) {
      fail("head_dim", std::to_string(c.head_dim) + " is not qk_nope_head_dim + qk_rope_head_dim");
    }
    if (c.positions != PositionKind::kRope) fail("position_embedding_type", "latent attention needs \"rope\"");
    if (c.qk_norm != QkNorm::kNone) fail("qk_norm", "latent attention needs \"none\"");
    if (c.clip_qkv != 0) fail("clip_qkv", "latent attention needs 0");
    if (c.attention_sinks) fail("attention_sinks", "true does not go with latent attention");
    if (c.rotary_dim != 0) fail("rotary_dim", "does not go with latent attention: qk_rope_head_dim says it");
  }

  void activation(const ModelConfig& c) const {
    if (c.activation == Activation::kNone) fail("hidden_act", "missing");
    if (c.activation == Activation::kClampedSwiglu && !c.gated_mlp) {
      fail("hidden_act", std::string(activation_name(c.activation)) + " needs gated_mlp");
    }
  }

  void layer(const std::string& field, const LayerConfig& l) const {
    if (l.window < 0) fail(field + "window", std::to_string(l.window) + " is negative");
    if (!l.is_moe()) {
      if (l.router.num_experts < 0) fail(field + "num_experts", std::to_string(l.router.num_experts) + " is negative");
      size(field + "intermediate_size", l.intermediate_size);
      if (l.residual != ResidualKind::kNone) fail(field + "residual", "a dense layer has none");
      return;
    }
    size(field + "num_experts", l.router.num_experts, 1 << 16);
    size(field + "expert_intermediate_size", l.expert_intermediate_size);
    if (l.router.top_k < 1 || l.router.top_k > l.router.num_experts) {
      fail(field + "top_k", std::to_string(l.router.top_k) + " is not in [1, " + std::to_string(l.router.num_experts) +
                                "], the number of experts");
    }
    number(field + "router.routed_scaling", l.router.routed_scaling);
    try {
      l.router.validate();
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(source_ + ": " + field.substr(0, field.size() - 1) + ": " + error.what());
    }
    if (l.residual == ResidualKind::kNone) {
      if (l.intermediate_size != 0) {
        fail(field + "intermediate_size", std::to_string(l.intermediate_size) + " given, but residual is \"none\"");
      }
    } else {
      size(field + "intermediate_size", l.intermediate_size);
    }
  }

 private:
  const std::string& source_;
};

}  // namespace

ModelConfig ModelConfig::from_json(const std::string& text, const std::string& source) {
  const nlohmann::json json = parse_json(text, source);
  const ConfigReader reader(json, source);
  const Architecture& architecture = architecture_of(reader);
  ModelConfig config = architecture.read_config(reader);
  config.architecture = architecture.name;
  config.validate(source);
  return config;
}

ModelConfig ModelConfig::from_file(const std::string& path) { return from_json(read_text_file(path), path); }

std::string ModelConfig::to_json() const { return kCoterieArchitecture.write_config(*this).dump(2) + "\n"; }

void ModelConfig::validate(const std::string& source) const {
  const Validator check(source);
  check.size("vocab_size", vocab_size);
  check.size("hidden_size", hidden_size);
  check.size("num_attention_heads", num_heads, 1 << 16);
  check.size("num_key_value_heads", num_kv_heads, 1 << 16);
  check.size("head_dim", head_dim, 1 << 16);
  check.size("max_position_embeddings", max_position_embeddings, kMostPositions);
  if (num_heads % num_kv_heads != 0) {
    check.fail("num_key_value_heads", std::to_string(num_kv_heads) + " does not divide num_attention_heads (" +
                                          std::to_string(num_heads) + ")");
  }
  if (is_latent()) check.latent(*this);
  if (positions == PositionKind::kRope) check.rotary(*this);
  check.number("embedding_multiplier", embedding_multiplier);
  check.number("attention_multiplier", attention_multiplier, true);
  check.number("residual_multiplier", residual_multiplier);
  check.number("logits_scaling", logits_scaling);
  check.number("norm_eps", norm_eps);
  check.number("clip_qkv", clip_qkv, true);
  check.number("initializer_range", initializer_range, true);
  check.activation(*this);
  for (const int64_t id : eos_token_ids) {
    if (id < 0) check.fail("eos_token_id", std::to_string(id) + " is negative");
  }
  if (layers.empty()) check.fail("layers", "empty");
  for (size_t n = 0; n < layers.size(); ++n) check.layer("layers[" + std::to_string(n) + "].", layers[n]);

  // Every size alone is possible here; their product may still be more than 64 bits can count.
  double parameters = 0;
  for (const TensorSpec& tensor : logical_tensors(*this)) {
    double elements = 1;
    for (const int64_t dim : tensor.shape) elements *= static_cast<double>(dim);
    parameters += elements;
  }
  if (parameters > 1e16) check.fail("layers", "more than 1e16 parameters");
}

float ModelConfig::score_scale() const {
  return attention_multiplier > 0 ? attention_multiplier : 1.0f / std::sqrt(static_cast<float>(head_dim));
}

int64_t ModelConfig::num_rotary_dims() const {
  if (is_latent()) return latent.rope_dim;
  return rotary_dim > 0 ? rotary_dim : head_dim;
}

int64_t ModelConfig::attention_width() const { return num_heads * (is_latent() ? latent.v_dim : head_dim); }

std::string ModelConfig::untrainable() const {
  const std::string no = " is not trained";
  if (rope_scaling != RopeScaling()) return "rope_scaling: stretching of positions" + no;
  if (rotary_dim != 0) return "rotary_dim: " + std::to_string(rotary_dim) + no;
  if (rope_interleaved) return "rope_interleaved: true" + no;
  if (is_latent()) return "latent_attention:" + no;
  if (attention_sinks) return "attention_sinks: true" + no;
  if (lm_head_bias) return "lm_head_bias: true" + no;
  if (activation == Activation::kClampedSwiglu) return "hidden_act: " + std::string(activation_name(activation)) + no;
  for (const auto& [key, value, plain] : {std::tuple("embedding_multiplier", embedding_multiplier, 1.0f),
                                          {"attention_multiplier", attention_multiplier, 0.0f},
                                          {"residual_multiplier", residual_multiplier, 1.0f},
                                          {"logits_scaling", logits_scaling, 1.0f}}) {
    if (value != plain) return std::string(key) + ": " + Json(shortest_decimal(value)).dump() + no;
  }
  for (size_t n = 0; n < layers.size(); ++n) {
    const std::string layer = "layers[" + std::to_string(n) + "].";
    if (layers[n].window != 0) return layer + "window: " + std::to_string(layers[n].window) + no;
    if (layers[n].router.logit_bias) return layer + "router.logit_bias: true" + no;
    if (layers[n].router.score_function == ScoreFunction::kSparsemixer) {
      return layer + "router.score_function: sparsemixer" + no;
    }
  }
  return "";
}

int64_t ModelConfig::num_parameters() const {
  int64_t total = 0;
  for (const TensorSpec& tensor : logical_tensors(*this)) total += tensor.num_elements();
  return total;
}

int64_t ModelConfig::num_active_parameters() const {
  int64_t total = num_parameters();
  for (const LayerConfig& layer : layers) {
    if (!layer.is_moe()) continue;
    const int64_t inner = layer.expert_intermediate_size, up = gated_mlp ? 2 * inner : inner;
    const int64_t expert = (up + inner) * hidden_size + (mlp_bias ? up + hidden_size : 0);
    total -= (layer.router.num_experts - layer.router.top_k) * expert;
  }
  return total;
}

}  // namespace coterie
