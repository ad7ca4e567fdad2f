// The architectures that we read and write, one Architecture each, one file per family
// (architecture_*.cc). A new architecture is one more file and one more line in architectures.cc;
// the decoder, which sees only ModelConfig and logical tensors, does not change.
#pragma once

#include <span>
#include <string>

#include "model/checkpoint_map.h"
#include "model/config.h"
#include "model/config_reader.h"

namespace coterie {

struct Architecture {
  const char* name;        // as in config.json's "architectures"
  const char* model_type;  // as in config.json's "model_type"

  // A config.json of this architecture, not yet validated. Whatever it asks for that we lack is refused.
  ModelConfig (*read_config)(const ConfigReader& json);

  // The best config.json of this architecture for a model. Whether it says everything is found by
  // reading it back (see export.h).
  Json (*write_config)(const ModelConfig& config);

  // Where a checkpoint of this architecture keeps the tensors of a model that it can express.
  CheckpointMap (*checkpoint_map)(const ModelConfig& config);

  const char* alias = "";  // another name in "architectures", which is read and never written
};

std::span<const Architecture* const> architectures();

// By name; InvalidArgument lists the known ones.
const Architecture& architecture_named(const std::string& name, const std::string& source);

extern const Architecture kCoterieArchitecture;
extern const Architecture kLlamaArchitecture;
extern const Architecture kMistralArchitecture;
extern const Architecture kQwen2Architecture;
extern const Architecture kQwen3Architecture;
extern const Architecture kMixtralArchitecture;
extern const Architecture kOlmoeArchitecture;
extern const Architecture kQwen2MoeArchitecture;
extern const Architecture kQwen3MoeArchitecture;
extern const Architecture kGpt2Architecture;
extern const Architecture kGraniteMoeArchitecture;
extern const Architecture kPhimoeArchitecture;
extern const Architecture kGlm4MoeArchitecture;
extern const Architecture kGptOssArchitecture;
extern const Architecture kDeepseekV2Architecture;
extern const Architecture kDeepseekV3Architecture;

// Pieces of the parsers that every family shares.
Activation read_activation(const ConfigReader& json, const std::string& key, const std::string& fallback);
std::vector<int64_t> read_token_ids(const ConfigReader& json, const std::string& key);
// "quantization_config.quant_method: 'gptq' is not supported", for every method but one that is read, if any.
void refuse_quantization(const ConfigReader& json, const std::string& but_for = "");
int64_t read_num_layers(const ConfigReader& json, const std::string& key, int64_t fallback);
Json token_ids_json(const std::vector<int64_t>& ids);  // null, an id, or a list
Json optional_id_json(int64_t id);                     // null for -1

}  // namespace coterie
