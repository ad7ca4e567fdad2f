#include "model/architectures.h"

#include "coterie/error.h"
#include "io/printable.h"

namespace coterie {

std::span<const Architecture* const> architectures() {
  // In the order in which an export with architecture "auto" tries them; our own, which can say
  // everything, comes last.
  static constexpr const Architecture* kAll[] = {
      &kLlamaArchitecture,    &kGpt2Architecture,       &kMistralArchitecture,    &kQwen2Architecture,
      &kQwen3Architecture,    &kMixtralArchitecture,    &kOlmoeArchitecture,      &kQwen3MoeArchitecture,
      &kQwen2MoeArchitecture, &kGraniteMoeArchitecture, &kPhimoeArchitecture,     &kGlm4MoeArchitecture,
      &kGptOssArchitecture,   &kDeepseekV2Architecture, &kDeepseekV3Architecture, &kCoterieArchitecture,
  };
  return kAll;
}

const Architecture& architecture_named(const std::string& name, const std::string& source) {
  std::string known;
  for (const Architecture* architecture : architectures()) {
    if (name == architecture->name || (!name.empty() && name == architecture->alias)) return *architecture;
    known += (known.empty() ? "" : ", ") + std::string(architecture->name);
  }
  throw InvalidArgument(source + ": architectures: " + printable(name) + " is not supported (supported: " + known +
                        ")");
}

Activation read_activation(const ConfigReader& json, const std::string& key, const std::string& fallback) {
  const std::string name = json.text(key, fallback);
  try {
    return activation_from_name(name);
  } catch (const InvalidArgument&) {
    json.fail(key, "'" + name + "' is not supported (supported: silu, gelu, gelu_new, gelu_pytorch_tanh, relu)");
  }
}

std::vector<int64_t> read_token_ids(const ConfigReader& json, const std::string& key) {
  if (!json.has(key)) return {};
  if (json.value(key).is_array()) return json.integers(key);
  return {json.integer(key)};
}

void refuse_quantization(const ConfigReader& json, const std::string& but_for) {
  if (!json.has("quantization_config")) return;
  const ConfigReader quantization = json.object("quantization_config");
  const std::string method = quantization.text("quant_method");
  if (but_for.empty() || method != but_for) quantization.fail("quant_method", "'" + method + "' is not supported");
}

int64_t read_num_layers(const ConfigReader& json, const std::string& key, int64_t fallback) {
  const int64_t n = json.integer(key, fallback);
  if (n < 1 || n > 10000) json.fail(key, std::to_string(n) + " is not in [1, 10000]");
  return n;
}

Json token_ids_json(const std::vector<int64_t>& ids) {
  if (ids.empty()) return nullptr;
  if (ids.size() == 1) return ids[0];
  return ids;
}

Json optional_id_json(int64_t id) { return id < 0 ? Json(nullptr) : Json(id); }

}  // namespace coterie
