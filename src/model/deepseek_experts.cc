#include "model/deepseek_experts.h"

#include <algorithm>

namespace coterie {
namespace {

void only(const ConfigReader& json, const char* key, const char* supported) {
  const std::string value = json.text(key, supported);
  if (value != supported) json.fail(key, "'" + value + "' is not supported (only '" + supported + "')");
}

// All of a MoE layer but how its router scores and groups.
LayerConfig read_layer(const ConfigReader& json, const SharedExpertDefaults& d) {
  LayerConfig layer;
  layer.router.num_experts = json.integer("n_routed_experts", json.integer("num_local_experts", d.num_experts));
  if (layer.router.num_experts < 1) {
    json.fail("n_routed_experts", std::to_string(layer.router.num_experts) + " is below 1");
  }
  layer.router.top_k = json.integer("num_experts_per_tok", d.top_k);
  layer.router.routed_scaling = static_cast<float>(json.number("routed_scaling_factor", d.routed_scaling));
  layer.expert_intermediate_size = json.integer("moe_intermediate_size", d.inner);
  const int64_t shared = json.present("n_shared_experts") ? json.integer("n_shared_experts", 0) : d.num_shared;
  if (shared < 0 || shared > 1 << 16) json.fail("n_shared_experts", std::to_string(shared) + " is not in [0, 65536]");
  if (layer.expert_intermediate_size < 1 || layer.expert_intermediate_size > 1 << 24) {
    json.fail("moe_intermediate_size", std::to_string(layer.expert_intermediate_size) + " is not in [1, 16777216]");
  }
  layer.intermediate_size = shared * layer.expert_intermediate_size;
  layer.residual = shared > 0 ? ResidualKind::kSum : ResidualKind::kNone;
  return layer;
}

void read_groups(const ConfigReader& json, const SharedExpertDefaults& d, RouterConfig& router) {
  router.num_groups = json.integer("n_group", d.num_groups);
  router.top_k_groups = json.integer("topk_group", d.top_k_groups);
}

void assign(const ConfigReader& json, const LayerConfig& moe, const SharedExpertDefaults& d, ModelConfig& c) {
  const int64_t first = json.integer("first_k_dense_replace", d.first_dense);
  const int64_t every = json.integer("moe_layer_freq", 1);
  if (every < 1) json.fail("moe_layer_freq", std::to_string(every) + " is below 1");
  for (int64_t n = first; n < c.num_layers(); ++n) {
    if (n >= 0 && n % every == 0) c.layers[n] = moe;
  }
}

}  // namespace

void read_sigmoid_experts(const ConfigReader& json, const SharedExpertDefaults& defaults, ModelConfig& config) {
  only(json, "scoring_func", "sigmoid");
  only(json, "topk_method", "noaux_tc");
  LayerConfig moe = read_layer(json, defaults);
  moe.router.score_function = ScoreFunction::kSigmoid;
  moe.router.choice_bias = true;
  moe.router.group_score = GroupScore::kTopTwo;
  moe.router.normalize = json.boolean("norm_topk_prob", true);
  read_groups(json, defaults, moe.router);
  assign(json, moe, defaults, config);
}

void read_softmax_experts(const ConfigReader& json, const SharedExpertDefaults& defaults, ModelConfig& config) {
  only(json, "scoring_func", "softmax");
  LayerConfig moe = read_layer(json, defaults);
  const std::string method = json.text("topk_method", "greedy");
  if (method != "greedy" && method != "group_limited_greedy") {
    json.fail("topk_method", "'" + method + "' is not supported (supported: greedy, group_limited_greedy)");
  }
  if (method == "group_limited_greedy") read_groups(json, defaults, moe.router);
  // transformers has no normalisation here, DeepSeek's own code has one instead of the scaling.
  if (json.boolean("norm_topk_prob", false)) json.fail("norm_topk_prob", "true is not supported");
  assign(json, moe, defaults, config);
}

void write_shared_experts(const ModelConfig& c, Json& json) {
  const LayerConfig& moe = typical_moe_layer(c);
  const RouterConfig& router = moe.router;
  int64_t first = 0;
  while (first < c.num_layers() && !c.layers[first].is_moe()) ++first;
  const int64_t inner = std::max<int64_t>(moe.expert_intermediate_size, 1);
  json["n_routed_experts"] = router.num_experts;
  json["num_experts_per_tok"] = router.top_k;
  json["moe_intermediate_size"] = moe.expert_intermediate_size;
  json["n_shared_experts"] = moe.intermediate_size / inner;
  json["first_k_dense_replace"] = first;
  json["n_group"] = router.num_groups;
  json["topk_group"] = router.top_k_groups;
  json["norm_topk_prob"] = router.normalize;
  json["routed_scaling_factor"] = shortest_decimal(router.routed_scaling);
  json["scoring_func"] = score_function_name(router.score_function);
  const bool sigmoid = router.score_function == ScoreFunction::kSigmoid;
  json["topk_method"] = sigmoid ? "noaux_tc" : router.num_groups > 1 ? "group_limited_greedy" : "greedy";
}

CheckpointMap shared_experts_map(const ModelConfig& config) {
  CheckpointMap map = map_family(config, {.shared = "shared_experts"});
  map.first_ignored_layer = config.num_layers();
  return map;
}

}  // namespace coterie
