// GraniteMoeForCausalLM of transformers: a Llama with four multipliers and a MoE in every layer.
#include "model/architectures.h"
#include "model/transformers_family.h"

namespace coterie {
namespace {

constexpr Defaults kGraniteMoe = {32000, 4096, 11008, 32, 32, 0, 2048, 1e-6, 1e4, 1, 2};

float read_multiplier(const ConfigReader& json, const char* key) {
  const double value = json.number(key, 1.0);
  if (value <= 0) json.fail(key, Json(value).dump() + " is not positive");
  return static_cast<float>(value);
}

ModelConfig read_config(const ConfigReader& json) {
  ModelConfig c = read_family(json, kGraniteMoe);
  refuse_layer_types(json);
  if (c.hidden_size % c.num_heads != 0 || c.head_dim != c.hidden_size / c.num_heads) {
    json.fail("head_dim", std::to_string(c.head_dim) + " is not hidden_size / num_attention_heads");
  }
  c.attention_bias = c.attention_output_bias = json.boolean("attention_bias", false);
  c.embedding_multiplier = read_multiplier(json, "embedding_multiplier");
  c.attention_multiplier = read_multiplier(json, "attention_multiplier");
  c.residual_multiplier = read_multiplier(json, "residual_multiplier");
  c.logits_scaling = read_multiplier(json, "logits_scaling");
  LayerConfig layer = read_moe_layer(json, 8, 2, /*normalize=*/true);
  layer.expert_intermediate_size = c.layers[0].intermediate_size;
  c.layers.assign(c.layers.size(), layer);
  return c;
}

Json write_config(const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  Json json = write_family(c, kGraniteMoeArchitecture);
  json["attention_bias"] = c.attention_bias;
  json["intermediate_size"] = moe.expert_intermediate_size;
  json["num_local_experts"] = moe.router.num_experts;
  json["num_experts_per_tok"] = moe.router.top_k;
  json["embedding_multiplier"] = shortest_decimal(c.embedding_multiplier);
  json["attention_multiplier"] = shortest_decimal(c.score_scale());
  json["residual_multiplier"] = shortest_decimal(c.residual_multiplier);
  json["logits_scaling"] = shortest_decimal(c.logits_scaling);
  return json;
}

CheckpointMap checkpoint_map(const ModelConfig& config) {
  return map_family(config, {.block = "block_sparse_moe",
                             .router = "router.layer",
                             .stacked_up = "input_linear.weight",
                             .stacked_down = "output_linear.weight"});
}

}  // namespace

const Architecture kGraniteMoeArchitecture = {"GraniteMoeForCausalLM", "granitemoe", read_config, write_config,
                                              checkpoint_map};

}  // namespace coterie
