// The Llama family of Hugging Face transformers: LlamaForCausalLM, MixtralForCausalLM,
// OlmoeForCausalLM, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM. Keys and defaults as in the
// configuration_*.py files of transformers 5.
#include <algorithm>
#include <map>

#include "base/check.h"
#include "model/architectures.h"

namespace coterie {
namespace {

// What a config.json of transformers means where it leaves a key out.
struct Defaults {
  int64_t vocab_size;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_layers;
  int64_t num_heads;
  int64_t num_kv_heads;  // 0: as num_heads
  int64_t max_position_embeddings;
  double norm_eps;
  double rope_theta;
  int64_t bos_token_id;  // -1: none
  int64_t eos_token_id;
};
constexpr Defaults kLlama = {32000, 4096, 11008, 32, 32, 0, 2048, 1e-6, 1e4, 1, 2};
constexpr Defaults kMixtral = {32000, 4096, 14336, 32, 32, 8, 131072, 1e-5, 1e6, 1, 2};
constexpr Defaults kOlmoe = {50304, 2048, 2048, 16, 16, 0, 4096, 1e-5, 1e4, -1, 50279};
constexpr Defaults kQwen2Moe = {151936, 2048, 5632, 24, 16, 16, 32768, 1e-6, 1e4, -1, -1};
constexpr Defaults kQwen3Moe = {151936, 2048, 6144, 24, 32, 4, 32768, 1e-6, 1e4, -1, -1};

void refuse_partial_rotary(const ConfigReader& json) {
  const double factor = json.number("partial_rotary_factor", 1.0);
  if (factor != 1.0) json.fail("partial_rotary_factor", Json(factor).dump() + " is not supported (only 1.0)");
}

// rope_theta stands in rope_parameters (transformers 5) or beside an optional rope_scaling (before).
double read_rope_theta(const ConfigReader& json, double fallback) {
  refuse_partial_rotary(json);
  const double theta = json.number("rope_theta", fallback);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!json.has(key) || json.value(key).empty()) continue;
    const ConfigReader rope = json.object(key);
    const std::string type = rope.text("rope_type", rope.text("type", "default"));
    if (type != "default") rope.fail("rope_type", "'" + type + "' is not supported (only 'default')");
    rope.ignore("type");
    refuse_partial_rotary(rope);
    const double own_theta = rope.number("rope_theta", theta);
    rope.refuse_unknown("not supported");
    return own_theta;
  }
  return theta;
}

void refuse_what_we_lack(const ConfigReader& json) {
  if (json.has("quantization_config"))
    json.fail("quantization_config", "quantized weights of this kind are not supported");
  if (json.boolean("use_sliding_window", false)) json.fail("use_sliding_window", "true is not supported");
  if (!json.has("layer_types")) return;
  for (const nlohmann::json& type : json.value("layer_types")) {
    if (type != "full_attention") json.fail("layer_types", type.dump() + " is not supported (only \"full_attention\")");
  }
}

ModelConfig read_base(const ConfigReader& json, const Defaults& defaults) {
  refuse_what_we_lack(json);
  ModelConfig c;
  c.vocab_size = json.integer("vocab_size", defaults.vocab_size);
  c.hidden_size = json.integer("hidden_size", defaults.hidden_size);
  c.num_heads = json.integer("num_attention_heads", defaults.num_heads);
  if (c.num_heads < 1) json.fail("num_attention_heads", std::to_string(c.num_heads) + " is below 1");
  const bool kv_default = !json.present("num_key_value_heads") && defaults.num_kv_heads > 0;
  c.num_kv_heads = json.integer("num_key_value_heads", kv_default ? defaults.num_kv_heads : c.num_heads);
  c.head_dim = json.integer("head_dim", c.hidden_size / c.num_heads);
  c.max_position_embeddings = json.integer("max_position_embeddings", defaults.max_position_embeddings);
  c.norm_eps = static_cast<float>(json.number("rms_norm_eps", defaults.norm_eps));
  c.rope_theta = read_rope_theta(json, defaults.rope_theta);
  c.activation = read_activation(json, "hidden_act", "silu");
  c.tie_word_embeddings = json.boolean("tie_word_embeddings", false);
  c.initializer_range = static_cast<float>(json.number("initializer_range", 0.02));
  c.bos_token_id = json.present("bos_token_id") ? json.integer("bos_token_id", -1) : defaults.bos_token_id;
  c.eos_token_ids = read_token_ids(json, "eos_token_id");
  if (!json.present("eos_token_id") && defaults.eos_token_id >= 0) c.eos_token_ids = {defaults.eos_token_id};

  LayerConfig dense;
  dense.intermediate_size = json.integer("intermediate_size", defaults.intermediate_size);
  c.layers.assign(read_num_layers(json, "num_hidden_layers", defaults.num_layers), dense);
  return c;
}

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

LayerConfig read_moe_layer(const ConfigReader& json, int64_t num_experts, int64_t top_k, bool normalize) {
  LayerConfig layer;
  layer.router.num_experts = read_num_experts(json, num_experts);
  layer.router.top_k = json.integer("num_experts_per_tok", top_k);
  layer.router.normalize = normalize;
  return layer;
}

void read_attention_bias(const ConfigReader& json, ModelConfig& c) {
  c.attention_bias = c.attention_output_bias = json.boolean("attention_bias", false);
}

ModelConfig read_llama(const ConfigReader& json) {
  ModelConfig c = read_base(json, kLlama);
  if (c.hidden_size % c.num_heads != 0) {  // transformers refuses it, whatever head_dim says
    json.fail("hidden_size", std::to_string(c.hidden_size) + " is not a multiple of num_attention_heads (" +
                                 std::to_string(c.num_heads) + ")");
  }
  read_attention_bias(json, c);
  c.mlp_bias = json.boolean("mlp_bias", false);
  return c;
}

ModelConfig read_mixtral(const ConfigReader& json) {
  ModelConfig c = read_base(json, kMixtral);
  const int64_t window = json.integer("sliding_window", c.max_position_embeddings);
  if (window < c.max_position_embeddings) json.fail("sliding_window", std::to_string(window) + " is not supported");
  LayerConfig layer = read_moe_layer(json, 8, 2, /*normalize=*/true);
  layer.expert_intermediate_size = c.layers[0].intermediate_size;
  c.layers.assign(c.layers.size(), layer);
  return c;
}

ModelConfig read_olmoe(const ConfigReader& json) {
  ModelConfig c = read_base(json, kOlmoe);
  // The norm of the queries is as wide as the model.
  if (c.hidden_size % c.num_heads != 0 || c.head_dim != c.hidden_size / c.num_heads) {
    json.fail("head_dim", std::to_string(c.head_dim) + " is not hidden_size / num_attention_heads (" +
                              std::to_string(c.hidden_size) + " / " + std::to_string(c.num_heads) + ")");
  }
  read_attention_bias(json, c);
  c.qk_norm = QkNorm::kFull;
  c.clip_qkv = static_cast<float>(json.number("clip_qkv", 0.0));
  LayerConfig layer = read_moe_layer(json, 64, 8, json.boolean("norm_topk_prob", false));
  layer.expert_intermediate_size = c.layers[0].intermediate_size;
  c.layers.assign(c.layers.size(), layer);
  return c;
}

// Qwen's rule: every decoder_sparse_step-th layer is a MoE layer unless mlp_only_layers names it.
void assign_qwen_layers(const ConfigReader& json, const LayerConfig& moe, ModelConfig& c) {
  const int64_t step = json.integer("decoder_sparse_step", 1);
  if (step < 1) json.fail("decoder_sparse_step", std::to_string(step) + " is below 1");
  const std::vector<int64_t> dense = json.integers("mlp_only_layers");
  for (int64_t n = 0; n < c.num_layers(); ++n) {
    const bool listed = std::find(dense.begin(), dense.end(), n) != dense.end();
    if (!listed && moe.is_moe() && (n + 1) % step == 0) c.layers[n] = moe;
  }
}

ModelConfig read_qwen2_moe(const ConfigReader& json) {
  ModelConfig c = read_base(json, kQwen2Moe);
  c.attention_bias = json.boolean("qkv_bias", true);
  LayerConfig moe = read_moe_layer(json, 60, 4, json.boolean("norm_topk_prob", false));
  moe.expert_intermediate_size = json.integer("moe_intermediate_size", 1408);
  moe.intermediate_size = json.integer("shared_expert_intermediate_size", 5632);
  moe.residual = ResidualKind::kSharedGate;
  assign_qwen_layers(json, moe, c);
  return c;
}

ModelConfig read_qwen3_moe(const ConfigReader& json) {
  ModelConfig c = read_base(json, kQwen3Moe);
  read_attention_bias(json, c);
  c.qk_norm = QkNorm::kHead;
  LayerConfig moe = read_moe_layer(json, 128, 8, json.boolean("norm_topk_prob", false));
  moe.expert_intermediate_size = json.integer("moe_intermediate_size", 768);
  assign_qwen_layers(json, moe, c);
  return c;
}

Json write_base(const ModelConfig& c, const Architecture& architecture) {
  return {{"architectures", Json::array({architecture.name})},
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
          {"rope_theta", c.rope_theta},
          {"rope_parameters", {{"rope_theta", c.rope_theta}, {"rope_type", "default"}}},
          {"tie_word_embeddings", c.tie_word_embeddings},
          {"initializer_range", shortest_decimal(c.initializer_range)},
          {"bos_token_id", optional_id_json(c.bos_token_id)},
          {"eos_token_id", token_ids_json(c.eos_token_ids)}};
}

// The first MoE layer, or layer 0 of a dense model.
const LayerConfig& typical_moe_layer(const ModelConfig& c) {
  const auto moe = std::find_if(c.layers.begin(), c.layers.end(), [](const LayerConfig& l) { return l.is_moe(); });
  return moe == c.layers.end() ? c.layers[0] : *moe;
}

void write_moe(Json& json, const LayerConfig& moe) {
  json["num_experts"] = moe.router.num_experts;
  json["num_experts_per_tok"] = moe.router.top_k;
  json["norm_topk_prob"] = moe.router.normalize;
}

Json write_llama(const ModelConfig& c) {
  Json json = write_base(c, kLlamaArchitecture);
  json["attention_bias"] = c.attention_bias;
  json["mlp_bias"] = c.mlp_bias;
  return json;
}

Json write_mixtral(const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  Json json = write_base(c, kMixtralArchitecture);
  json["intermediate_size"] = moe.expert_intermediate_size;
  json["num_local_experts"] = moe.router.num_experts;
  json["num_experts_per_tok"] = moe.router.top_k;
  json["sliding_window"] = nullptr;
  return json;
}

Json write_olmoe(const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  Json json = write_base(c, kOlmoeArchitecture);
  write_moe(json, moe);
  json["intermediate_size"] = moe.expert_intermediate_size;
  json["attention_bias"] = c.attention_bias;
  json["clip_qkv"] = c.clip_qkv > 0 ? Json(shortest_decimal(c.clip_qkv)) : Json(nullptr);
  return json;
}

void write_qwen_layers(Json& json, const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  write_moe(json, moe);
  json["moe_intermediate_size"] = moe.expert_intermediate_size;
  json["decoder_sparse_step"] = 1;
  json["mlp_only_layers"] = Json::array();
  for (int64_t n = 0; n < c.num_layers(); ++n) {
    if (c.layers[n].is_moe()) continue;
    json["mlp_only_layers"].push_back(n);
    json["intermediate_size"] = c.layers[n].intermediate_size;
  }
}

Json write_qwen2_moe(const ModelConfig& c) {
  Json json = write_base(c, kQwen2MoeArchitecture);
  json["shared_expert_intermediate_size"] = typical_moe_layer(c).intermediate_size;
  json["qkv_bias"] = c.attention_bias;
  write_qwen_layers(json, c);
  return json;
}

Json write_qwen3_moe(const ModelConfig& c) {
  Json json = write_base(c, kQwen3MoeArchitecture);
  json["attention_bias"] = c.attention_bias;
  write_qwen_layers(json, c);
  return json;
}

// How the files of one architecture call the parts of a feed-forward block.
struct BlockNames {
  std::string block = "mlp";
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";  // of the experts
};

// gate and up are two stored matrices, one logical tensor: gate rows first.
std::vector<Piece> gate_up_pieces(const TensorSpec& spec, int64_t offset, const std::string& gate,
                                  const std::string& up) {
  const bool is_weight = spec.shape.size() > 1;
  const int64_t cols = is_weight ? spec.shape.back() : 1;
  const int64_t inner = spec.shape[is_weight ? spec.shape.size() - 2 : 0] / 2;
  const std::vector<int64_t> shape = is_weight ? std::vector<int64_t>{inner, cols} : std::vector<int64_t>{inner};
  return {{.stored = gate, .stored_shape = shape, .offset = offset, .rows = inner, .cols = cols},
          {.stored = up, .stored_shape = shape, .offset = offset + inner * cols, .rows = inner, .cols = cols}};
}

// One by one under the experts' numbers as transformers saves them, or stacked as it holds them.
std::vector<std::vector<Piece>> expert_forms(const TensorSpec& spec, bool is_up, const std::string& layer,
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
                          .cols = cols});
    }
  }
  const std::string stacked = layer + "mlp.experts." + (is_up ? "gate_up_proj" : "down_proj");
  return {separate, {whole_piece(spec, stacked)}};
}

std::vector<std::vector<Piece>> layer_forms(const LogicalName& name, const TensorSpec& spec, bool is_moe,
                                            const BlockNames& names) {
  static const std::map<std::string, std::string> kNames = {{"input_norm", "input_layernorm"},
                                                            {"post_attention_norm", "post_attention_layernorm"},
                                                            {"mix", "mlp.shared_expert_gate"}};
  const std::string layer = "model.layers." + std::to_string(name.layer) + ".";
  const std::string mlp = layer + (is_moe ? "mlp.shared_expert." : "mlp.");
  const std::string& module = name.module;
  if (module == "experts.up" || module == "experts.down")
    return expert_forms(spec, module == "experts.up", layer, names);
  if (module == "mlp.up") {
    return {gate_up_pieces(spec, 0, mlp + "gate_proj." + name.kind, mlp + "up_proj." + name.kind)};
  }
  if (module == "mlp.down") return {{whole_piece(spec, mlp + "down_proj." + name.kind)}};
  if (module == "router") {
    return {{whole_piece(spec, layer + names.block + ".gate.weight")}, {whole_piece(spec, layer + "mlp.gate.weight")}};
  }
  if (module.starts_with("attention."))
    return {{whole_piece(spec, layer + "self_attn." + module.substr(10) + "." + name.kind)}};
  const auto stored = kNames.find(module);
  COTERIE_CHECK(stored != kNames.end(), spec.name + " has no place in this architecture");
  return {{whole_piece(spec, layer + stored->second + "." + name.kind)}};
}

CheckpointMap map_with(const ModelConfig& config, const BlockNames& names) {
  CheckpointMap map = map_tensors(config, [&](const LogicalName& name, const TensorSpec& spec) {
    if (name.layer < 0) return std::vector<std::vector<Piece>>{{whole_piece(spec, spec.name)}};
    return layer_forms(name, spec, config.layers[name.layer].is_moe(), names);
  });
  map.base_prefix = "model.";
  map.ignored_suffixes = {"rotary_emb.inv_freq"};
  if (config.tie_word_embeddings) map.ignored_suffixes.push_back("lm_head.weight");
  return map;
}

CheckpointMap llama_map(const ModelConfig& config) { return map_with(config, {}); }
CheckpointMap mixtral_map(const ModelConfig& config) {
  return map_with(config, {"block_sparse_moe", "w1", "w3", "w2"});
}

}  // namespace

const Architecture kLlamaArchitecture = {"LlamaForCausalLM", "llama", read_llama, write_llama, llama_map};
const Architecture kMixtralArchitecture = {"MixtralForCausalLM", "mixtral", read_mixtral, write_mixtral, mixtral_map};
const Architecture kOlmoeArchitecture = {"OlmoeForCausalLM", "olmoe", read_olmoe, write_olmoe, llama_map};
const Architecture kQwen2MoeArchitecture = {"Qwen2MoeForCausalLM", "qwen2_moe", read_qwen2_moe, write_qwen2_moe,
                                            llama_map};
const Architecture kQwen3MoeArchitecture = {"Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe, write_qwen3_moe,
                                            llama_map};

}  // namespace coterie
