// DeepseekV2ForCausalLM and DeepseekV3ForCausalLM of transformers: latent attention, and experts chosen by groups.
#include <cmath>

#include "model/architectures.h"
#include "model/deepseek_experts.h"
#include "model/transformers_family.h"

namespace coterie {
namespace {

constexpr Defaults kV2 = {102400, 4096, 11008, 32, 32, 0, 2048, 1e-6, 1e4, 1, 2};
constexpr Defaults kV3 = {129280, 7168, 18432, 61, 128, 0, 4096, 1e-6, 1e4, 0, 1};
constexpr SharedExpertDefaults kV2Experts = {.num_experts = 64,
                                             .top_k = 1,
                                             .inner = 1407,
                                             .num_shared = 2,
                                             .first_dense = 0,
                                             .num_groups = 1,
                                             .top_k_groups = 1,
                                             .routed_scaling = 1.0};
constexpr SharedExpertDefaults kV3Experts = {.num_experts = 256,
                                             .top_k = 8,
                                             .inner = 2048,
                                             .num_shared = 1,
                                             .first_dense = 3,
                                             .num_groups = 8,
                                             .top_k_groups = 4,
                                             .routed_scaling = 2.5};

// A stretch by yarn makes scores sharper, too: each of a query and a key grows by mscale(mscale_all_dim).
float attention_multiplier(const ModelConfig& c) {
  if (c.rope_scaling.kind == RopeScalingKind::kNone || c.rope_scaling.mscale_all_dim == 0) return 0.0f;
  const double mscale = yarn_mscale(c.rope_scaling.factor, c.rope_scaling.mscale_all_dim);
  return static_cast<float>(mscale * mscale / std::sqrt(static_cast<double>(c.head_dim)));
}

void read_latent_attention(const ConfigReader& json, ModelConfig& c) {
  c.latent = {.kv_rank = json.integer("kv_lora_rank", 512),
              .q_rank = json.present("q_lora_rank") ? json.integer("q_lora_rank", 0) : 1536,
              .nope_dim = json.integer("qk_nope_head_dim", 128),
              .rope_dim = json.integer("qk_rope_head_dim", 64),
              .v_dim = json.integer("v_head_dim", 128)};
  if (c.latent.kv_rank < 1) json.fail("kv_lora_rank", std::to_string(c.latent.kv_rank) + " is below 1");
  if (c.num_kv_heads != c.num_heads) {
    json.fail("num_key_value_heads", std::to_string(c.num_kv_heads) + " is not num_attention_heads (" +
                                         std::to_string(c.num_heads) + "), as latent attention needs it");
  }
  c.head_dim = c.latent.nope_dim + c.latent.rope_dim;
  c.attention_bias = c.attention_output_bias = json.boolean("attention_bias", false);
  c.attention_multiplier = attention_multiplier(c);
  // transformers 4 wrote n_group and pretraining_tp as DeepSeek has them; the latter changes nothing at 1.
  const int64_t pretraining_tp = json.integer("pretraining_tp", 1);
  if (pretraining_tp != 1) json.fail("pretraining_tp", std::to_string(pretraining_tp) + " is not supported (only 1)");
}

ModelConfig read_v2(const ConfigReader& json) {
  ModelConfig c = read_family(json, kV2);
  refuse_layer_types(json);
  if (json.boolean("mlp_bias", false)) json.fail("mlp_bias", "true is not supported");
  c.rope_interleaved = true;
  read_latent_attention(json, c);
  read_softmax_experts(json, kV2Experts, c);
  return c;
}

ModelConfig read_v3(const ConfigReader& json) {
  ModelConfig c = read_family(json, kV3);
  refuse_layer_types(json);
  c.rope_interleaved = json.boolean("rope_interleave", true);
  read_latent_attention(json, c);
  read_sigmoid_experts(json, kV3Experts, c);
  return c;
}

Json write_base(const ModelConfig& c, const Architecture& architecture) {
  Json json = write_family(c, architecture);
  json["head_dim"] = c.latent.rope_dim;  // as transformers has it here
  json["kv_lora_rank"] = c.latent.kv_rank;
  json["q_lora_rank"] = c.latent.q_rank > 0 ? Json(c.latent.q_rank) : Json(nullptr);
  json["qk_nope_head_dim"] = c.latent.nope_dim;
  json["qk_rope_head_dim"] = c.latent.rope_dim;
  json["v_head_dim"] = c.latent.v_dim;
  json["attention_bias"] = c.attention_bias;
  write_shared_experts(c, json);
  return json;
}

Json write_v2(const ModelConfig& c) { return write_base(c, kDeepseekV2Architecture); }

Json write_v3(const ModelConfig& c) {
  Json json = write_base(c, kDeepseekV3Architecture);
  json["rope_interleave"] = c.rope_interleaved;
  json["num_nextn_predict_layers"] = 0;
  return json;
}

}  // namespace

const Architecture kDeepseekV2Architecture = {"DeepseekV2ForCausalLM", "deepseek_v2", read_v2, write_v2,
                                              shared_experts_map};
const Architecture kDeepseekV3Architecture = {"DeepseekV3ForCausalLM", "deepseek_v3", read_v3, write_v3,
                                              shared_experts_map};

}  // namespace coterie
