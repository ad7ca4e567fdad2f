// Rotary positions as config.json files of transformers say them: rope_theta and partial_rotary_factor beside an
// optional "rope_scaling" (transformers 4), or all of it in "rope_parameters" (transformers 5).
#pragma once

#include <optional>

#include "model/config.h"
#include "model/config_reader.h"

namespace coterie {

// What an architecture means where its file is silent. Unset partial_rotary_factor: heads turn as a whole,
// another factor than 1 is refused. longrope_mscales: "longrope" must come with "short_mscale" and "long_mscale"
// (Phi-MoE), and no other type is known; else they are refused.
struct RopeDefaults {
  double theta = 10000.0;
  std::optional<double> partial_rotary_factor = {};
  bool longrope_mscales = false;
};

// Fills rope_theta, rope_scaling and rotary_dim. head_dim (the part that is turned, in latent attention) and
// max_position_embeddings must be there already. Refuses by name: other types, unknown keys.
void read_rope(const ConfigReader& json, const RopeDefaults& defaults, int64_t head_dim, ModelConfig& config);

// One object "rope_type", "factor", ... of our own files and of transformers', which may keep the original context
// outside of it.
RopeScaling read_rope_scaling(const ConfigReader& rope, const std::string& type, int64_t max_positions,
                              std::optional<int64_t> original_outside = {});
Json rope_scaling_json(const RopeScaling& scaling);

// Sets rope_theta, rope_parameters and, with `partial`, partial_rotary_factor.
void write_rope(const ModelConfig& config, int64_t head_dim, bool partial, Json& json);

}  // namespace coterie
