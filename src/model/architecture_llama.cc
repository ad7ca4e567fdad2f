// The Llama family of Hugging Face transformers: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM,
// Qwen3ForCausalLM, MixtralForCausalLM, OlmoeForCausalLM, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM.
#include <algorithm>

#include "model/architectures.h"
#include "model/transformers_family.h"

namespace coterie {
namespace {

constexpr Defaults kLlama = {32000, 4096, 11008, 32, 32, 0, 2048, 1e-6, 1e4, 1, 2};
constexpr Defaults kMistral = {32000, 4096, 14336, 32, 32, 8, 131072, 1e-6, 1e4, 1, 2};
constexpr Defaults kQwen2 = {151936, 4096, 22016, 32, 32, 32, 32768, 1e-6, 1e4, -1, -1};
constexpr Defaults kQwen3 = {151936, 4096, 22016, 32, 32, 32, 32768, 1e-6, 1e4, -1, -1};
constexpr Defaults kMixtral = {32000, 4096, 14336, 32, 32, 8, 131072, 1e-5, 1e6, 1, 2};
constexpr Defaults kOlmoe = {50304, 2048, 2048, 16, 16, 0, 4096, 1e-5, 1e4, -1, 50279};
constexpr Defaults kQwen2Moe = {151936, 2048, 5632, 24, 16, 16, 32768, 1e-6, 1e4, -1, -1};
constexpr Defaults kQwen3Moe = {151936, 2048, 6144, 24, 32, 4, 32768, 1e-6, 1e4, -1, -1};

void refuse_windows(const ConfigReader& json) {
  if (json.boolean("use_sliding_window", false)) json.fail("use_sliding_window", "true is not supported");
  refuse_layer_types(json);
}

// Mistral's rule: one window for every layer.
void read_window_of_all_layers(const ConfigReader& json, int64_t fallback, ModelConfig& c) {
  refuse_layer_types(json);
  const int64_t window = json.present("sliding_window") ? read_window(json) : fallback;
  for (LayerConfig& layer : c.layers) layer.window = window;
}

void write_window_of_all_layers(const ModelConfig& c, Json& json) {
  json["sliding_window"] = c.layers[0].window > 0 ? Json(c.layers[0].window) : Json(nullptr);
}

// Qwen's rule: the layers from max_window_layers on, or those that layer_types names, and only with
// use_sliding_window.
void read_qwen_windows(const ConfigReader& json, ModelConfig& c) {
  const bool used = json.boolean("use_sliding_window", false);
  const int64_t window = json.present("sliding_window") ? read_window(json) : 4096;
  const int64_t first = json.integer("max_window_layers", 28);
  std::vector<bool> slides(c.layers.size());
  for (int64_t n = 0; n < c.num_layers(); ++n) slides[n] = used && window > 0 && n >= first;
  if (json.has("layer_types")) slides = read_layer_types(json, c.num_layers());
  for (int64_t n = 0; n < c.num_layers(); ++n) {
    if (!slides[n]) continue;
    if (!used || window == 0) json.fail("layer_types", "\"sliding_attention\" without use_sliding_window");
    c.layers[n].window = window;
  }
}

void write_qwen_windows(const ModelConfig& c, Json& json) {
  write_windows(c, json);
  json["use_sliding_window"] = !json["sliding_window"].is_null();
}

void read_qkvo_bias(const ConfigReader& json, ModelConfig& c) {
  c.attention_bias = c.attention_output_bias = json.boolean("attention_bias", false);
}

ModelConfig read_llama(const ConfigReader& json) {
  refuse_windows(json);
  ModelConfig c = read_family(json, kLlama);
  if (c.hidden_size % c.num_heads != 0) {  // transformers refuses it, whatever head_dim says
    json.fail("hidden_size", std::to_string(c.hidden_size) + " is not a multiple of num_attention_heads (" +
                                 std::to_string(c.num_heads) + ")");
  }
  read_qkvo_bias(json, c);
  c.mlp_bias = json.boolean("mlp_bias", false);
  return c;
}

ModelConfig read_mistral(const ConfigReader& json) {
  ModelConfig c = read_family(json, kMistral);
  read_window_of_all_layers(json, 4096, c);
  return c;
}

ModelConfig read_qwen2(const ConfigReader& json) {
  ModelConfig c = read_family(json, kQwen2);
  c.attention_bias = true;
  read_qwen_windows(json, c);
  return c;
}

ModelConfig read_qwen3(const ConfigReader& json) {
  ModelConfig c = read_family(json, kQwen3, {.head_dim = 128});
  read_qkvo_bias(json, c);
  c.qk_norm = QkNorm::kHead;
  read_qwen_windows(json, c);
  return c;
}

ModelConfig read_mixtral(const ConfigReader& json) {
  ModelConfig c = read_family(json, kMixtral);
  LayerConfig layer = read_moe_layer(json, 8, 2, /*normalize=*/true);
  layer.expert_intermediate_size = c.layers[0].intermediate_size;
  c.layers.assign(c.layers.size(), layer);
  read_window_of_all_layers(json, 0, c);
  return c;
}

ModelConfig read_olmoe(const ConfigReader& json) {
  refuse_windows(json);
  ModelConfig c = read_family(json, kOlmoe);
  // The norm of the queries is as wide as the model.
  if (c.hidden_size % c.num_heads != 0 || c.head_dim != c.hidden_size / c.num_heads) {
    json.fail("head_dim", std::to_string(c.head_dim) + " is not hidden_size / num_attention_heads (" +
                              std::to_string(c.hidden_size) + " / " + std::to_string(c.num_heads) + ")");
  }
  read_qkvo_bias(json, c);
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
  refuse_windows(json);
  ModelConfig c = read_family(json, kQwen2Moe);
  c.attention_bias = json.boolean("qkv_bias", true);
  LayerConfig moe = read_moe_layer(json, 60, 4, json.boolean("norm_topk_prob", false));
  moe.expert_intermediate_size = json.integer("moe_intermediate_size", 1408);
  moe.intermediate_size = json.integer("shared_expert_intermediate_size", 5632);
  moe.residual = ResidualKind::kSharedGate;
  assign_qwen_layers(json, moe, c);
  return c;
}

ModelConfig read_qwen3_moe(const ConfigReader& json) {
  refuse_windows(json);
  ModelConfig c = read_family(json, kQwen3Moe);
  read_qkvo_bias(json, c);
  c.qk_norm = QkNorm::kHead;
  LayerConfig moe = read_moe_layer(json, 128, 8, json.boolean("norm_topk_prob", false));
  moe.expert_intermediate_size = json.integer("moe_intermediate_size", 768);
  assign_qwen_layers(json, moe, c);
  return c;
}

void write_moe(Json& json, const LayerConfig& moe) {
  json["num_experts"] = moe.router.num_experts;
  json["num_experts_per_tok"] = moe.router.top_k;
  json["norm_topk_prob"] = moe.router.normalize;
}

Json write_llama(const ModelConfig& c) {
  Json json = write_family(c, kLlamaArchitecture);
  json["attention_bias"] = c.attention_bias;
  json["mlp_bias"] = c.mlp_bias;
  return json;
}

Json write_mistral(const ModelConfig& c) {
  Json json = write_family(c, kMistralArchitecture);
  write_window_of_all_layers(c, json);
  return json;
}

Json write_qwen2(const ModelConfig& c) {
  Json json = write_family(c, kQwen2Architecture);
  write_qwen_windows(c, json);
  return json;
}

Json write_qwen3(const ModelConfig& c) {
  Json json = write_family(c, kQwen3Architecture);
  json["attention_bias"] = c.attention_bias;
  write_qwen_windows(c, json);
  return json;
}

Json write_mixtral(const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  Json json = write_family(c, kMixtralArchitecture);
  json["intermediate_size"] = moe.expert_intermediate_size;
  json["num_local_experts"] = moe.router.num_experts;
  json["num_experts_per_tok"] = moe.router.top_k;
  write_window_of_all_layers(c, json);
  return json;
}

Json write_olmoe(const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  Json json = write_family(c, kOlmoeArchitecture);
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
  Json json = write_family(c, kQwen2MoeArchitecture);
  json["shared_expert_intermediate_size"] = typical_moe_layer(c).intermediate_size;
  json["qkv_bias"] = c.attention_bias;
  write_qwen_layers(json, c);
  return json;
}

Json write_qwen3_moe(const ModelConfig& c) {
  Json json = write_family(c, kQwen3MoeArchitecture);
  json["attention_bias"] = c.attention_bias;
  write_qwen_layers(json, c);
  return json;
}

CheckpointMap llama_map(const ModelConfig& config) { return map_family(config, {}); }
CheckpointMap mixtral_map(const ModelConfig& config) {
  return map_family(config, {.block = "block_sparse_moe", .gate = "w1", .up = "w3", .down = "w2"});
}

}  // namespace

const Architecture kLlamaArchitecture = {"LlamaForCausalLM", "llama", read_llama, write_llama, llama_map};
const Architecture kMistralArchitecture = {"MistralForCausalLM", "mistral", read_mistral, write_mistral, llama_map};
const Architecture kQwen2Architecture = {"Qwen2ForCausalLM", "qwen2", read_qwen2, write_qwen2, llama_map};
const Architecture kQwen3Architecture = {"Qwen3ForCausalLM", "qwen3", read_qwen3, write_qwen3, llama_map};
const Architecture kMixtralArchitecture = {"MixtralForCausalLM", "mixtral", read_mixtral, write_mixtral, mixtral_map};
const Architecture kOlmoeArchitecture = {"OlmoeForCausalLM", "olmoe", read_olmoe, write_olmoe, llama_map};
const Architecture kQwen2MoeArchitecture = {"Qwen2MoeForCausalLM", "qwen2_moe", read_qwen2_moe, write_qwen2_moe,
                                            llama_map};
const Architecture kQwen3MoeArchitecture = {"Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe, write_qwen3_moe,
                                            llama_map};

}  // namespace coterie
