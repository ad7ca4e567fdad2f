// config.json of every architecture: whatever is accepted must survive its own round trip.
#include <cstdlib>

#include "coterie/error.h"
#include "fuzz_target.h"
#include "model/architectures.h"
#include "model/test_model.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using coterie::ModelConfig;
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    const ModelConfig config = ModelConfig::from_json(text, "config.json");
    if (config.num_active_parameters() > config.num_parameters()) std::abort();
    const std::string json = config.to_json();
    if (ModelConfig::from_json(json, "written").to_json() != json) std::abort();
  } catch (const coterie::InvalidArgument& error) {
    if (std::string(error.what()).starts_with("written")) std::abort();
  } catch (const coterie::CorruptFile&) {  // not JSON
  }
  return 0;
}

std::vector<std::string> seeds() {
  std::vector<std::string> files;
  for (const coterie::Architecture* architecture : coterie::architectures()) {
    coterie::ModelConfig config;
    config.vocab_size = 7, config.hidden_size = 12, config.num_heads = 6, config.num_kv_heads = 2, config.head_dim = 2;
    config.max_position_embeddings = 9;
    config.layers.resize(2);
    config.layers[0].intermediate_size = 5;
    config.layers[1].router.num_experts = 3;
    config.layers[1].expert_intermediate_size = 4;
    files.push_back(architecture->write_config(config).dump());
  }
  files.push_back(coterie::windowed_config().to_json());
  files.push_back(coterie::longrope_config().to_json());
  files.push_back(coterie::latent_config().to_json());
  return files;
}
