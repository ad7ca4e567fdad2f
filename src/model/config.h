// What a model is, read from a config.json: one struct for every architecture, so that the decoder,
// the trainer and the exporter never ask for an architecture's name.
//
// Our own files say `"architectures": ["CoterieForCausalLM"]`, `"model_type": "coterie"`:
//   vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
//   max_position_embeddings, norm_type ("rms_norm" | "layer_norm"), norm_eps,
//   position_embedding_type ("rope" | "learned"), rope_theta, rope_scaling (null, or an object as transformers has it,
//   of the types linear, dynamic, llama3, yarn and longrope, this one with Phi-MoE's short_mscale and long_mscale),
//   rotary_dim (null: all of a head), rope_interleaved, qk_norm ("none" | "head" | "full"),
//   latent_attention (null, or {"kv_lora_rank", "q_lora_rank" (0: none), "qk_nope_head_dim", "qk_rope_head_dim",
//   "v_head_dim", "norm_eps"}), attention_sinks,
//   clip_qkv (0: not), hidden_act, gated_mlp, attention_bias (q, k, v), attention_output_bias, mlp_bias, lm_head_bias,
//   embedding_multiplier, attention_multiplier (null: 1 / sqrt(head_dim)), residual_multiplier, logits_scaling,
//   tie_word_embeddings, initializer_range, bos_token_id, eos_token_id (an id or a list),
//   layers: one object per layer:
//     {"num_experts": 0, "intermediate_size": F}                              a dense layer
//     {"num_experts": E, "top_k": K, "expert_intermediate_size": F,           a MoE layer
//      "residual": "none" | "sum" | "learned" | "shared_gate", "intermediate_size": F of the fixed MLP,
//      "router": {"score_function", "chooser", "num_groups", "top_k_groups", "group_score", "choice_bias",
//                 "normalize", "normalize_over", "routed_scaling", "choice_noise", "jitter", "capacity_factor",
//                 "eval_capacity_factor", "min_capacity", "drop_policy", "logit_bias", "sparsemixer_epsilon"}}
//                                                                         see moe/router.h
//   each with "window": so many keys a token sees, its own included; left out: all.
// Unknown keys that would change the result are refused; a value that cannot be is refused by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "model/rope_scaling.h"
#include "moe/router.h"

namespace coterie {

enum class NormKind { kRmsNorm, kLayerNorm };
enum class PositionKind { kRope, kLearned };

// Normalisation of queries and keys before the rotation: over each head (Qwen3) or over the whole
// projection (OLMoE). Always RMSNorm.
enum class QkNorm { kNone, kHead, kFull };

// What stands beside the routed experts, with y = experts(x), m = the fixed MLP(x):
//   kNone       y
//   kSum        m + y                                        PR-MoE as the paper has it
//   kLearned    c_0 y + c_1 m, c = softmax(W_mix x + b_mix)  PR-MoE as DeepSpeed's code has it
//   kSharedGate y + sigmoid(w_mix x) m                       Qwen2-MoE's shared expert
enum class ResidualKind { kNone, kSum, kLearned, kSharedGate };

// Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one latent vector
// per token, which is what the cache holds (see model/latent_attention.h).
struct LatentAttention {
  int64_t kv_rank = 0;   // of the latent vector; 0: attention has keys and values of its own
  int64_t q_rank = 0;    // queries come through a bottleneck of this width; 0: straight
  int64_t nope_dim = 0;  // of a query's and a key's part that is not turned, which comes first
  int64_t rope_dim = 0;  // of the part that is turned, which all heads share of the key
  int64_t v_dim = 0;     // of a value
  float norm_eps = 1e-6f;

  bool operator==(const LatentAttention&) const = default;
};

struct LayerConfig {
  int64_t window = 0;                    // keys that a token sees, its own included; 0: all
  int64_t intermediate_size = 0;         // of the dense MLP, or of the fixed MLP beside the experts; 0: none
  int64_t expert_intermediate_size = 0;  // of each routed expert
  ResidualKind residual = ResidualKind::kNone;
  RouterConfig router = {};  // num_experts == 0: a dense layer

  bool is_moe() const { return router.num_experts > 0; }
};

struct ModelConfig {
  std::string architecture = "CoterieForCausalLM";
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  NormKind norm = NormKind::kRmsNorm;
  float norm_eps = 1e-5f;
  PositionKind positions = PositionKind::kRope;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling = {};
  int64_t rotary_dim = 0;         // the first elements of a head, which are turned; 0: all
  bool rope_interleaved = false;  // neighbours turn together, and not i with i + rotary_dim / 2
  LatentAttention latent = {};
  bool attention_sinks = false;  // a score per head that takes part in every softmax, without a value
  QkNorm qk_norm = QkNorm::kNone;
  float clip_qkv = 0.0f;  // clamp q, k, v to [-clip, clip] after the projection and the q and k norms (OLMoE); 0: off
  Activation activation = Activation::kSilu;
  bool gated_mlp = true;
  bool attention_bias = false;  // of the q, k and v projections
  bool attention_output_bias = false;
  bool mlp_bias = false;  // of dense MLPs and experts
  bool lm_head_bias = false;
  float embedding_multiplier = 1.0f;
  float attention_multiplier = 0.0f;  // of scores; 0: 1 / sqrt(head_dim)
  float residual_multiplier = 1.0f;   // of what attention and feed-forward add to the residual stream
  float logits_scaling = 1.0f;        // logits are divided by this
  bool tie_word_embeddings = true;
  float initializer_range = 0.02f;
  std::vector<LayerConfig> layers;
  int64_t bos_token_id = -1;
  std::vector<int64_t> eos_token_ids;

  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }
  bool is_latent() const { return latent.kv_rank > 0; }
  int64_t max_context() const { return rope_scaling.context(max_position_embeddings); }
  float score_scale() const;        // of the products of queries and keys
  int64_t num_rotary_dims() const;  // that are turned in a head
  int64_t attention_width() const;  // of all heads' outputs: the columns of o_proj

  // What the cache holds of a token in a layer: keys of so many heads, and values; without values when they are the
  // first part of the keys.
  int64_t cache_heads() const { return is_latent() ? 1 : num_kv_heads; }
  int64_t cache_key_dim() const { return is_latent() ? latent.kv_rank + latent.rope_dim : head_dim; }
  int64_t cache_value_dim() const { return is_latent() ? 0 : head_dim; }

  // `source` (a file's name) begins every message of InvalidArgument.
  static ModelConfig from_json(const std::string& text, const std::string& source);
  static ModelConfig from_file(const std::string& path);
  std::string to_json() const;  // as CoterieForCausalLM, whatever the architecture was
  void validate(const std::string& source) const;

  // The first thing that the trainer does not do, as "field: what", or empty.
  std::string untrainable() const;

  // All parameters, and those that one token meets (top_k experts of each MoE layer; the embedding
  // table counts once when tied).
  int64_t num_parameters() const;
  int64_t num_active_parameters() const;
};

}  // namespace coterie
