// For tests: small models with random weights, as files.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "base/philox.h"
#include "io/safetensors.h"
#include "model/config.h"
#include "model/tensors.h"

namespace coterie {

// Uniform numbers in [-scale, scale), the same for the same key.
inline std::vector<float> random_values(int64_t n, uint64_t key, float scale) {
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = scale * (2 * philox_uniform(key, 7, i) - 1);
  return values;
}

// A pyramid with a dense layer, a plain MoE layer and the residual kinds; grouped-query heads, sizes odd.
inline ModelConfig small_config() {
  ModelConfig c;
  c.vocab_size = 61, c.hidden_size = 20, c.num_heads = 6, c.num_kv_heads = 2, c.head_dim = 10;
  c.max_position_embeddings = 96, c.tie_word_embeddings = false;
  const auto moe = [](int64_t experts, int64_t top_k, ResidualKind residual) {
    LayerConfig layer;
    layer.expert_intermediate_size = 13, layer.residual = residual;
    layer.intermediate_size = residual == ResidualKind::kNone ? 0 : 24;
    layer.router.num_experts = experts, layer.router.top_k = top_k;
    return layer;
  };
  LayerConfig dense;
  dense.intermediate_size = 28;
  c.layers = {dense, moe(7, 3, ResidualKind::kNone), moe(4, 1, ResidualKind::kSum), moe(5, 2, ResidualKind::kLearned)};
  return c;
}

// The same with what attention may be besides: windows, sinks and positions stretched by the prompt's length, or
// latent attention.
inline ModelConfig windowed_config() {
  ModelConfig c = small_config();
  c.attention_sinks = true, c.rotary_dim = 6;
  c.max_position_embeddings = 48;
  c.rope_scaling = {.kind = RopeScalingKind::kDynamic, .factor = 2, .original_context = 48};
  c.layers[1].window = 9, c.layers[3].window = 21;
  return c;
}
// Or positions stretched by other factors beyond half of the context.
inline ModelConfig longrope_config() {
  ModelConfig c = small_config();
  c.rope_scaling = {.kind = RopeScalingKind::kLongrope,
                    .factor = 2,
                    .original_context = 48,
                    .short_factors = {1, 1.5, 1.25, 3, 2},
                    .long_factors = {4, 2, 9, 1, 6}};
  return c;
}
inline ModelConfig latent_config() {
  ModelConfig c = small_config();
  c.num_kv_heads = c.num_heads, c.head_dim = 14, c.rope_interleaved = true;
  c.latent = {.kv_rank = 18, .q_rank = 11, .nope_dim = 8, .rope_dim = 6, .v_dim = 10};
  return c;
}

// Writes config.json and model.safetensors of CoterieForCausalLM.
inline void write_random_model(const std::filesystem::path& directory, const ModelConfig& config, float scale = 0.5f) {
  std::filesystem::create_directories(directory);
  std::vector<std::vector<float>> values;
  std::vector<TensorToWrite> tensors;
  for (const TensorSpec& spec : logical_tensors(config)) {
    values.push_back(random_values(spec.num_elements(), values.size(), scale));
    tensors.push_back({spec.name, spec.shape, DType::kF32, values.back().data()});
  }
  write_safetensors((directory / "model.safetensors").string(), tensors);
  write_text_file((directory / "config.json").string(), config.to_json());
}

}  // namespace coterie
