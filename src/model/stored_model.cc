#include "model/stored_model.h"

#include <algorithm>
#include <filesystem>

#include "coterie/error.h"
#include "io/gguf.h"
#include "io/safetensors.h"
#include "model/architectures.h"
#include "model/gguf_model.h"

namespace coterie {
namespace {

std::string config_path(const std::string& directory) {
  if (!std::filesystem::exists(directory)) throw InvalidArgument(directory + ": no such file or directory");
  if (!std::filesystem::is_directory(directory)) {
    throw InvalidArgument(directory + ": neither a model's directory nor a .gguf file");
  }
  return (std::filesystem::path(directory) / "config.json").string();
}

}  // namespace

bool is_gguf_path(const std::string& path) { return path.ends_with(".gguf"); }

std::unique_ptr<TensorSource> open_tensors(const std::string& path) {
  if (is_gguf_path(path)) return std::make_unique<GgufSource>(path);
  return std::make_unique<SafetensorsSource>(path);
}

ModelConfig read_model_config(const std::string& path) {
  if (is_gguf_path(path)) return config_from_gguf(GgufSource(path));
  return ModelConfig::from_file(config_path(path));
}

bool StoredModel::all_bf16() const {
  return std::ranges::all_of(file_->tensors(), [](const StoredTensor& tensor) { return tensor.dtype == "BF16"; });
}

StoredModel::StoredModel(const std::string& path) {
  if (is_gguf_path(path)) {
    auto file = std::make_unique<GgufSource>(path);
    config_ = config_from_gguf(*file);
    view_ = std::make_unique<GgufLlamaSource>(*file, config_);
    file_ = std::move(file);
  } else {
    config_ = ModelConfig::from_file(config_path(path));
    file_ = std::make_unique<SafetensorsSource>(path);
  }
  const Architecture& architecture = architecture_named(config_.architecture, path);
  reader_ = std::make_unique<LogicalReader>(view_ ? *view_ : *file_, architecture.checkpoint_map(config_));
}

}  // namespace coterie
