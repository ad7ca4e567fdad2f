#include "model/transformers_family.h"

#include <algorithm>
#include <map>

#include "base/check.h"

namespace coterie {
namespace {

// transformers 4 wrote num_experts where transformers 5 writes num_local_experts, or the reverse.
int64_t read_num_experts(const ConfigReader& json, int64_t fallback) {
  const int64_t n = json.integer("num_experts", json.integer("num_local_experts", fallback));
  if (json.integer("num_local_experts", n) != n) {
    json.fail("num_local_experts",
              json.value("num_local_experts").dump() + ", but num_experts is " + std::to_string(n));
  }
  if (n < 0) json.fail("num_experts", std::to_string(n) + " is negative");
  return n;
}

void read_tokens(const ConfigReader& json, const Defaults& defaults, ModelConfig& c) {
  c.bos_token_id = json.present("bos_token_id") ? json.integer("bos_token_id", -1) : defaults.bos_token_id;
  c.eos_token_ids = read_token_ids(json, "eos_token_id");
  if (!json.present("eos_token_id") && defaults.eos_token_id >= 0) c.eos_token_ids = {defaults.eos_token_id};
}

void read_heads(const ConfigReader& json, const Defaults& defaults, const FamilyOptions& options, ModelConfig& c) {
  c.num_heads = json.integer("num_attention_heads", defaults.num_heads);
  if (c.num_heads < 1) json.fail("num_attention_heads", std::to_string(c.num_heads) + " is below 1");
  const bool kv_default = !json.present("num_key_value_heads") && defaults.num_kv_heads > 0;
  c.num_kv_heads = json.integer("num_key_value_heads", kv_default ? defaults.num_kv_heads : c.num_heads);
  c.head_dim = json.integer(
      "head_dim", options.head_dim > 0 && !json.present("head_dim") ? options.head_dim : c.hidden_size / c.num_heads);
}

// gate and up are two stored matrices, one logical tensor: gate rows first.
std::vector<Piece> gate_up_pieces(const TensorSpec& spec, int64_t offset, const std::string& gate,
                                  const std::string& up) {
  const bool is_weight = spec.shape.size() > 1;
  const int64_t cols = is_weight ? spec.shape.back() : 1;
  const int64_t inner = spec.shape[is_weight ? spec.shape.size() - 2 : 0] / 2;
  const std::vector<int64_t> shape = is_weight ? std::vector<int64_t>{inner, cols} : std::vector<int64_t>{inner};
  return {
      {.stored = gate, .stored_shape = shape, .offset = offset, .rows = inner, .cols = cols, .row_stride = cols},
      {.stored = up,
       .stored_shape = shape,
       .offset = offset + inner * cols,
       .rows = inner,
       .cols = cols,
       .row_stride = cols},
  };
}

std::vector<Piece> separate_experts(const TensorSpec& spec, bool is_up, const std::string& layer,
                                    const BlockNames& names) {
  const int64_t rows = spec.shape[1], cols = spec.shape[2];
  std::vector<Piece> separate;
  for (int64_t e = 0; e < spec.shape[0]; ++e) {
    const std::string expert = layer + names.block + ".experts." + std::to_string(e) + ".";
    const int64_t offset = e * rows * cols;
    if (is_up) {
      const auto pieces = gate_up_pieces(spec, offset, expert + names.gate + ".weight", expert + names.up + ".weight");
      separate.insert(separate.end(), pieces.begin(), pieces.end());
    } else {
      separate.push_back({.stored = expert + names.down + ".weight",
                          .stored_shape = {rows, cols},
                          .offset = offset,
                          .rows = rows,
                          .cols = cols,
                          .row_stride = cols});
    }
  }
  return separate;
}

// One by one under the experts' numbers or stacked, as transformers saves them; or stacked as it holds them.
std::vector<std::vector<Piece>> expert_forms(const TensorSpec& spec, bool is_up, const std::string& layer,
                                             const BlockNames& names) {
  const std::string& own = is_up ? names.stacked_up : names.stacked_down;
  const std::string held = is_up ? ".experts.gate_up_proj" : ".experts.down_proj";
  std::vector<std::vector<Piece>> forms;
  if (own.empty()) {
    forms.push_back(separate_experts(spec, is_up, layer, names));
  } else {
    forms.push_back({whole_piece(spec, layer + names.block + "." + own)});
  }
  forms.push_back({whole_piece(spec, layer + "mlp" + held)});
  if (names.block != "mlp") forms.push_back({whole_piece(spec, layer + names.block + held)});
  return forms;
}

std::vector<std::vector<Piece>> router_forms(const LogicalName& name, const TensorSpec& spec, const std::string& layer,
                                             const BlockNames& names) {
  const std::string kind = name.kind == "choice_bias" ? "e_score_correction_bias" : name.kind;
  return {{whole_piece(spec, layer + names.block + "." + names.router + "." + kind)},
          {whole_piece(spec, layer + "mlp.gate." + kind)},
          {whole_piece(spec, layer + "mlp.router." + kind)}};
}

std::vector<std::vector<Piece>> layer_forms(const LogicalName& name, const TensorSpec& spec, bool is_moe,
                                            const BlockNames& names) {
  static const std::map<std::string, std::string> kNames = {
      {"input_norm", "input_layernorm"},
      {"post_attention_norm", "post_attention_layernorm"},
      {"mix", "mlp.shared_expert_gate"},
      {"attention.q_a_norm", "self_attn.q_a_layernorm"},
      {"attention.kv_a_norm", "self_attn.kv_a_layernorm"},
      {"attention.kv_a_proj", "self_attn.kv_a_proj_with_mqa"},
  };
  const std::string layer = "model.layers." + std::to_string(name.layer) + ".";
  const std::string mlp = layer + "mlp." + (is_moe ? names.shared + "." : "");
  const std::string& module = name.module;
  if (module == "experts.up" || module == "experts.down") {
    return expert_forms(spec, module == "experts.up", layer, names);
  }
  if (module == "mlp.up") {
    return {gate_up_pieces(spec, 0, mlp + "gate_proj." + name.kind, mlp + "up_proj." + name.kind)};
  }
  if (module == "mlp.down") return {{whole_piece(spec, mlp + "down_proj." + name.kind)}};
  if (module == "router") return router_forms(name, spec, layer, names);
  const auto stored = kNames.find(module);
  if (stored != kNames.end()) return {{whole_piece(spec, layer + stored->second + "." + name.kind)}};
  COTERIE_CHECK(module.starts_with("attention."), spec.name + " has no place in this architecture");
  return {{whole_piece(spec, layer + "self_attn." + module.substr(10) + "." + name.kind)}};
}

}  // namespace

ModelConfig read_family(const ConfigReader& json, const Defaults& defaults, const FamilyOptions& options) {
  refuse_quantization(json, options.mxfp4 ? "mxfp4" : "");
  ModelConfig c;
  c.vocab_size = json.integer("vocab_size", defaults.vocab_size);
  c.hidden_size = json.integer("hidden_size", defaults.hidden_size);
  read_heads(json, defaults, options, c);
  c.max_position_embeddings = json.integer("max_position_embeddings", defaults.max_position_embeddings);
  c.norm_eps = static_cast<float>(json.number("rms_norm_eps", defaults.norm_eps));
  read_rope(json, {defaults.rope_theta, options.partial_rotary_factor, options.longrope_mscales}, c.head_dim, c);
  c.activation = read_activation(json, "hidden_act", "silu");
  c.tie_word_embeddings = json.boolean("tie_word_embeddings", options.tie_word_embeddings);
  c.initializer_range = static_cast<float>(json.number("initializer_range", 0.02));
  read_tokens(json, defaults, c);

  LayerConfig dense;
  dense.intermediate_size = json.integer("intermediate_size", defaults.intermediate_size);
  c.layers.assign(read_num_layers(json, "num_hidden_layers", defaults.num_layers), dense);
  return c;
}

Json write_family(const ModelConfig& c, const Architecture& architecture) {
  Json json = {{"architectures", Json::array({architecture.name})},
               {"model_type", architecture.model_type},
               {"vocab_size", c.vocab_size},
               {"hidden_size", c.hidden_size},
               {"intermediate_size", c.layers[0].intermediate_size},
               {"num_hidden_layers", c.num_layers()},
               {"num_attention_heads", c.num_heads},
               {"num_key_value_heads", c.num_kv_heads},
               {"head_dim", c.head_dim},
               {"hidden_act", activation_name(c.activation)},
               {"max_position_embeddings", c.max_position_embeddings},
               {"rms_norm_eps", shortest_decimal(c.norm_eps)},
               {"tie_word_embeddings", c.tie_word_embeddings},
               {"initializer_range", shortest_decimal(c.initializer_range)},
               {"bos_token_id", optional_id_json(c.bos_token_id)},
               {"eos_token_id", token_ids_json(c.eos_token_ids)}};
  write_rope(c, c.head_dim, /*partial=*/false, json);
  return json;
}

LayerConfig read_moe_layer(const ConfigReader& json, int64_t num_experts, int64_t top_k, bool normalize) {
  LayerConfig layer;
  layer.router.num_experts = read_num_experts(json, num_experts);
  layer.router.top_k = json.integer("num_experts_per_tok", top_k);
  layer.router.normalize = normalize;
  return layer;
}

const LayerConfig& typical_moe_layer(const ModelConfig& c) {
  const auto moe = std::find_if(c.layers.begin(), c.layers.end(), [](const LayerConfig& l) { return l.is_moe(); });
  return moe == c.layers.end() ? c.layers[0] : *moe;
}

int64_t read_window(const ConfigReader& json) {
  if (!json.has("sliding_window")) return 0;
  const int64_t window = json.integer("sliding_window");
  if (window < 1) json.fail("sliding_window", std::to_string(window) + " is below 1");
  return window;
}

std::vector<bool> read_layer_types(const ConfigReader& json, int64_t num_layers) {
  const nlohmann::json& types = json.value("layer_types");
  if (!types.is_array() || static_cast<int64_t>(types.size()) != num_layers) {
    json.fail("layer_types", "is not a list of " + std::to_string(num_layers) + ", one for each layer");
  }
  std::vector<bool> slides;
  for (const nlohmann::json& type : types) {
    if (type != "full_attention" && type != "sliding_attention") {
      json.fail("layer_types", type.dump() + " is not supported (supported: full_attention, sliding_attention)");
    }
    slides.push_back(type == "sliding_attention");
  }
  return slides;
}

void refuse_layer_types(const ConfigReader& json) {
  if (!json.has("layer_types")) return;
  for (const nlohmann::json& type : json.value("layer_types")) {
    if (type != "full_attention") json.fail("layer_types", type.dump() + " is not supported (only \"full_attention\")");
  }
}

void write_windows(const ModelConfig& c, Json& json) {
  json["sliding_window"] = nullptr;
  json["layer_types"] = Json::array();
  for (const LayerConfig& layer : c.layers) {
    if (layer.window > 0) json["sliding_window"] = layer.window;
    json["layer_types"].push_back(layer.window > 0 ? "sliding_attention" : "full_attention");
  }
}

CheckpointMap map_family(const ModelConfig& config, const BlockNames& names) {
  CheckpointMap map = map_tensors(config, [&](const LogicalName& name, const TensorSpec& spec) {
    if (name.layer < 0) return std::vector<std::vector<Piece>>{{whole_piece(spec, spec.name)}};
    return layer_forms(name, spec, config.layers[name.layer].is_moe(), names);
  });
  map.base_prefix = "model.";
  map.ignored_suffixes = {"rotary_emb.inv_freq"};
  if (config.tie_word_embeddings) map.ignored_suffixes.push_back("lm_head.weight");
  return map;
}

}  // namespace coterie
