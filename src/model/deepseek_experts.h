// DeepSeek's experts, which other architectures have too: dense layers first, then routed experts with shared ones
// beside them, chosen by groups. Keys: n_routed_experts, num_experts_per_tok, moe_intermediate_size, n_shared_experts,
// first_k_dense_replace, moe_layer_freq, n_group, topk_group, topk_method, scoring_func, norm_topk_prob,
// routed_scaling_factor.
#pragma once

#include "model/transformers_family.h"

namespace coterie {

// Where a config.json leaves a key out.
struct SharedExpertDefaults {
  int64_t num_experts, top_k, inner, num_shared, first_dense, num_groups, top_k_groups;
  double routed_scaling;
};

// Sets the layers of a model whose dense layers are there. Shared experts are one MLP, as wide as all of them.
void read_sigmoid_experts(const ConfigReader& json, const SharedExpertDefaults& defaults, ModelConfig& config);
void read_softmax_experts(const ConfigReader& json, const SharedExpertDefaults& defaults, ModelConfig& config);

void write_shared_experts(const ModelConfig& config, Json& json);

// Tensors of layers behind the last are ignored: they predict further tokens, which we don't use.
CheckpointMap shared_experts_map(const ModelConfig& config);

}  // namespace coterie
