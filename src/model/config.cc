#include "model/config.h"

#include <cmath>

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
    if (!std::isfinite(value) || value < 0 || (value == 0 && !zero_allowed)) {
      fail(field, Json(value).dump() + " is not " + (zero_allowed ? "zero or positive" : "positive"));
    }
  }

  void layer(const std::string& field, const LayerConfig& l) const {
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
    number(field + "router.capacity_factor", l.router.capacity_factor, true);
    size(field + "router.min_capacity", l.router.min_capacity);
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
  check.size("max_position_embeddings", max_position_embeddings, int64_t{1} << 30);
  if (num_heads % num_kv_heads != 0) {
    check.fail("num_key_value_heads", std::to_string(num_kv_heads) + " does not divide num_attention_heads (" +
                                          std::to_string(num_heads) + ")");
  }
  if (positions == PositionKind::kRope) {
    if (head_dim % 2 != 0) check.fail("head_dim", std::to_string(head_dim) + " is odd, rotary positions need pairs");
    check.number("rope_theta", rope_theta);
  }
  check.number("norm_eps", norm_eps);
  check.number("clip_qkv", clip_qkv, true);
  check.number("initializer_range", initializer_range, true);
  if (activation == Activation::kNone) check.fail("hidden_act", "missing");
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
