#include "model/export.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <utility>
#include <vector>

#include "coterie/error.h"
#include "io/safetensors.h"
#include "model/architectures.h"
#include "model/stored_model.h"

namespace coterie {
namespace {

// What a model computes, as JSON: the configuration without what matters in training alone.
Json meaning(ModelConfig config) {
  for (LayerConfig& layer : config.layers) {
    RouterConfig& router = layer.router;
    router.chooser = Chooser::kTokens;
    router.normalize_over = NormalizeOver::kChosen;  // nothing is dropped
    router.choice_noise = ChoiceNoise::kNone;
    router.jitter = router.capacity_factor = router.eval_capacity_factor = 0;
    router.min_capacity = RouterConfig().min_capacity;
    router.drop_policy = RouterConfig().drop_policy;
    if (router.top_k_groups == router.num_groups) router.num_groups = router.top_k_groups = 1;  // all experts
    if (router.num_groups == 1) router.group_score = RouterConfig().group_score;
  }
  return Json::parse(config.to_json());
}

// The first key at which two configurations part, with the wanted value; empty when they are equal.
std::string first_difference(const Json& wanted, const Json& got, const std::string& path) {
  if (wanted == got) return "";
  if (wanted.is_object() && got.is_object()) {
    for (const auto& [key, value] : wanted.items()) {
      const std::string name = path.empty() ? key : path + "." + key;
      const std::string difference = first_difference(value, got.value(key, Json()), name);
      if (!difference.empty()) return difference;
    }
    for (const auto& [key, value] : got.items()) {
      if (!wanted.contains(key)) return (path.empty() ? key : path + "." + key) + ": left out";
    }
  }
  if (wanted.is_array() && got.is_array()) {
    for (size_t i = 0; i < std::min(wanted.size(), got.size()); ++i) {
      const std::string difference = first_difference(wanted[i], got[i], path + "[" + std::to_string(i) + "]");
      if (!difference.empty()) return difference;
    }
  }
  return path + ": " + wanted.dump();
}

// What the architecture cannot say of the model, or empty: its own config.json, read back, must mean
// the same.
std::string inexpressible(const Architecture& architecture, const ModelConfig& config) {
  const std::string source = architecture.name;
  try {
    const ModelConfig read = ModelConfig::from_json(architecture.write_config(config).dump(), source);
    return first_difference(meaning(config), meaning(read), "");
  } catch (const InvalidArgument& error) {
    return std::string(error.what()).substr(source.size() + 2);
  }
}

const Architecture& choose(const ModelConfig& config, const std::string& name, const std::string& source) {
  if (name != "auto") {
    const Architecture& wanted = architecture_named(name, source);
    const std::string difference = inexpressible(wanted, config);
    if (!difference.empty()) throw InvalidArgument(source + ": " + name + " cannot express " + difference);
    return wanted;
  }
  // A model keeps its own architecture where several could say it.
  const Architecture& own = architecture_named(config.architecture, source);
  if (&own != &kCoterieArchitecture && inexpressible(own, config).empty()) return own;
  for (const Architecture* candidate : architectures()) {
    if (inexpressible(*candidate, config).empty()) return *candidate;
  }
  return kCoterieArchitecture;
}

// The stored tensors of a file in the making.
class StoredTensors {
 public:
  explicit StoredTensors(DType dtype) : dtype_(dtype) {}

  void put(const Piece& piece, const std::vector<float>& logical) {
    const auto [place, added] = index_.emplace(piece.stored, tensors_.size());
    if (added) {
      StoredTensor tensor{piece.stored, piece.stored_shape, "", 0};
      values_.emplace_back(tensor.num_elements());
      tensors_.push_back(std::move(tensor));
    }
    copy_to_stored(piece, logical.data(), values_[place->second].data());
  }

  void write(const std::string& path) {
    std::vector<std::vector<char>> bytes;
    std::vector<TensorToWrite> out;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      bytes.emplace_back(values_[i].size() * dtype_size(dtype_));
      convert_from_float(values_[i].data(), dtype_, bytes.back().data(), values_[i].size());
      std::vector<float>().swap(values_[i]);
      out.push_back({tensors_[i].name, tensors_[i].shape, dtype_, bytes.back().data()});
    }
    write_safetensors(path, out, {{"format", "pt"}});
  }

 private:
  DType dtype_;
  std::map<std::string, size_t> index_;
  std::vector<StoredTensor> tensors_;
  std::vector<std::vector<float>> values_;
};

}  // namespace

std::string export_model(const std::string& source_dir, const std::string& out_dir, const std::string& architecture) {
  const StoredModel model(source_dir);
  const Architecture& target = choose(model.config(), architecture, source_dir);
  const DType dtype = model.all_bf16() ? DType::kBF16 : DType::kF32;

  StoredTensors stored(dtype);
  for (const MappedTensor& tensor : target.checkpoint_map(model.config()).tensors) {
    const std::vector<float> logical = model.tensors().read(tensor.spec.name);
    for (const Piece& piece : tensor.forms.front()) stored.put(piece, logical);
  }
  const std::filesystem::path directory(out_dir);
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw InvalidArgument(out_dir + ": cannot be made: " + error.message());
  stored.write((directory / "model.safetensors").string());
  Json config = target.write_config(model.config());
  config["dtype"] = config["torch_dtype"] = dtype == DType::kBF16 ? "bfloat16" : "float32";
  write_text_file((directory / "config.json").string(), config.dump(2) + "\n");
  return target.name;
}

}  // namespace coterie
