// What the config.json files and checkpoints of Hugging Face's decoder-only models have in common. Keys and defaults
// as in the configuration_*.py files of transformers 5.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "model/architectures.h"
#include "model/rope_json.h"

namespace coterie {

// What a config.json of transformers means where it leaves a key out.
struct Defaults {
  int64_t vocab_size;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_layers;
  int64_t num_heads;
  int64_t num_kv_heads;  // 0: as num_heads
  int64_t max_position_embeddings;
  double norm_eps;
  double rope_theta;
  int64_t bos_token_id;  // -1: none
  int64_t eos_token_id;
};

// Where architectures part.
struct FamilyOptions {
  int64_t head_dim = 0;                              // default of the key; 0: hidden_size / num_attention_heads
  std::optional<double> partial_rotary_factor = {};  // see RopeDefaults
  bool longrope_mscales = false;                     // likewise
  bool tie_word_embeddings = false;
  bool mxfp4 = false;  // a quantization_config of that method is fine
};

// The keys that all have, and num_hidden_layers dense layers. Refuses quantization_config.
ModelConfig read_family(const ConfigReader& json, const Defaults& defaults, const FamilyOptions& options = {});
Json write_family(const ModelConfig& c, const Architecture& architecture);

// num_experts or num_local_experts: transformers 4 wrote the one where transformers 5 writes the other, or the reverse.
LayerConfig read_moe_layer(const ConfigReader& json, int64_t num_experts, int64_t top_k, bool normalize);

// The first MoE layer, or layer 0 of a dense model.
const LayerConfig& typical_moe_layer(const ModelConfig& c);

// Windows. A null window is 0; layer_types: which layers are "sliding_attention" (others "full_attention").
int64_t read_window(const ConfigReader& json);
std::vector<bool> read_layer_types(const ConfigReader& json, int64_t num_layers);
void refuse_layer_types(const ConfigReader& json);     // all but "full_attention"
void write_windows(const ModelConfig& c, Json& json);  // sliding_window and layer_types

// How the files of an architecture call the parts of a feed-forward block.
struct BlockNames {
  std::string block = "mlp";
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";  // of the experts
  std::string shared = "shared_expert";                                // the fixed MLP beside them
  std::string router = "gate";
  // Stacked experts [E, U, D] and [E, D, F] under these names are what is written; else one by one.
  std::string stacked_up = "", stacked_down = "";
};

CheckpointMap map_family(const ModelConfig& config, const BlockNames& names);

}  // namespace coterie
