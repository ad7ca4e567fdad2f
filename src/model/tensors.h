// The logical tensors of a model: one name and shape per weight, whatever file it came from. Our own
// checkpoints and exports (CoterieForCausalLM) store exactly these. All weights are [out, in].
//
//   model.embed_tokens.weight [V, D]          model.embed_positions.weight [P, D]   (learned positions)
//   model.layers.N.input_norm.weight [D], .bias (LayerNorm)
//   model.layers.N.attention.{q,k,v}_proj.weight [heads * head_dim, D], .bias; o_proj.weight [D, H * head_dim], .bias
//   model.layers.N.attention.{q,k}_norm.weight [head_dim], or [heads * head_dim] when over the full width
//   of latent attention (d = qk_nope + qk_rope, R = kv_lora_rank, Q = q_lora_rank), instead of q, k and v:
//     q_proj.weight [H d, D], or q_a_proj.weight [Q, D], .bias, q_a_norm.weight [Q], q_b_proj.weight [H d, Q];
//     kv_a_proj.weight [R + qk_rope, D], .bias, kv_a_norm.weight [R], kv_b_proj.weight [H (qk_nope + v), R];
//     o_proj.weight [D, H v]
//   model.layers.N.attention.sinks.weight [H]
//   model.layers.N.post_attention_norm.weight, .bias
//   model.layers.N.mlp.up.weight [U, D], .up.bias [U], .down.weight [D, F], .down.bias [D]     dense or fixed MLP
//   model.layers.N.router.weight [E, D], .bias [E], .choice_bias [E]  (moved by the trainer, without a gradient)
//   model.layers.N.experts.up.weight [E, U, D], .up.bias [E, U], .down.weight [E, D, F], .down.bias [E, D]
//   model.layers.N.mix.weight [2, D], .mix.bias [2]  (learned)   or   [1, D], no bias  (shared_gate)
//   model.norm.weight, .bias                  lm_head.weight [V, D]  (untied), .bias [V]
// U = 2F when the MLP is gated (gate rows first, then up rows), else F.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"

namespace coterie {

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;

  int64_t num_elements() const;
};

// In the order above, layer by layer.
std::vector<TensorSpec> logical_tensors(const ModelConfig& config);

}  // namespace coterie
