// PhimoeForCausalLM of transformers, in published files PhiMoEForCausalLM: LayerNorm and biases around Mixtral's
// experts, chosen by sparsemixer.
#include "model/architectures.h"
#include "model/transformers_family.h"

namespace coterie {
namespace {

constexpr Defaults kPhimoe = {32064, 4096, 6400, 32, 32, 8, 131072, 1e-5, 1e6, 1, 2};

ModelConfig read_config(const ConfigReader& json) {
  ModelConfig c = read_family(json, kPhimoe, {.longrope_mscales = true});
  refuse_layer_types(json);
  c.norm = NormKind::kLayerNorm;
  c.attention_bias = c.attention_output_bias = json.boolean("attention_bias", false);
  c.lm_head_bias = json.boolean("lm_head_bias", false);
  LayerConfig layer = read_moe_layer(json, 16, 2, /*normalize=*/false);
  if (layer.router.top_k != 2) {  // the router of transformers chooses two, whatever its configuration says
    json.fail("num_experts_per_tok", std::to_string(layer.router.top_k) + " is not supported (only 2)");
  }
  layer.expert_intermediate_size = c.layers[0].intermediate_size;
  layer.router.score_function = ScoreFunction::kSparsemixer;
  layer.router.sparsemixer_epsilon = static_cast<float>(json.number("router_jitter_noise", 0.01));
  layer.window = read_window(json);
  c.layers.assign(c.layers.size(), layer);
  return c;
}

Json write_config(const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  Json json = write_family(c, kPhimoeArchitecture);
  json["attention_bias"] = c.attention_bias;
  json["lm_head_bias"] = c.lm_head_bias;
  json["intermediate_size"] = moe.expert_intermediate_size;
  json["num_local_experts"] = moe.router.num_experts;
  json["num_experts_per_tok"] = moe.router.top_k;
  json["router_jitter_noise"] = shortest_decimal(moe.router.sparsemixer_epsilon);
  json["sliding_window"] = moe.window > 0 ? Json(moe.window) : Json(nullptr);
  return json;
}

CheckpointMap checkpoint_map(const ModelConfig& config) {
  return map_family(config, {.block = "block_sparse_moe", .gate = "w1", .up = "w3", .down = "w2"});
}

}  // namespace

const Architecture kPhimoeArchitecture = {"PhimoeForCausalLM", "phimoe",       read_config,
                                          write_config,        checkpoint_map, "PhiMoEForCausalLM"};

}  // namespace coterie
