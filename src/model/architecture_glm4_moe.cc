// Glm4MoeForCausalLM of transformers: partly turned heads, and DeepSeek-V3's routing.
#include "model/architectures.h"
#include "model/deepseek_experts.h"
#include "model/transformers_family.h"

namespace coterie {
namespace {

constexpr Defaults kGlm4Moe = {151552, 4096, 10944, 46, 96, 8, 131072, 1e-5, 1e4, -1, -1};
constexpr SharedExpertDefaults kExperts = {.num_experts = 128,
                                           .top_k = 8,
                                           .inner = 1408,
                                           .num_shared = 1,
                                           .first_dense = 1,
                                           .num_groups = 1,
                                           .top_k_groups = 1,
                                           .routed_scaling = 1.0};

ModelConfig read_config(const ConfigReader& json) {
  ModelConfig c = read_family(json, kGlm4Moe, {.partial_rotary_factor = 0.5});
  refuse_layer_types(json);
  c.attention_bias = json.boolean("attention_bias", false);
  if (json.boolean("use_qk_norm", false)) c.qk_norm = QkNorm::kHead;
  read_sigmoid_experts(json, kExperts, c);
  return c;
}

Json write_config(const ModelConfig& c) {
  Json json = write_family(c, kGlm4MoeArchitecture);
  write_rope(c, c.head_dim, /*partial=*/true, json);
  json["attention_bias"] = c.attention_bias;
  json["use_qk_norm"] = c.qk_norm == QkNorm::kHead;
  write_shared_experts(c, json);
  json["num_nextn_predict_layers"] = 0;
  return json;
}

}  // namespace

const Architecture kGlm4MoeArchitecture = {"Glm4MoeForCausalLM", "glm4_moe", read_config, write_config,
                                           shared_experts_map};

}  // namespace coterie
