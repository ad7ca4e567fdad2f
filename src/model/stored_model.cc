#include "model/stored_model.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "coterie/error.h"
#include "io/atomic_file.h"
#include "io/checkpoint_source.h"
#include "io/gguf.h"
#include "io/json.h"
#include "io/mxfp4_source.h"
#include "io/safetensors.h"
#include "model/architectures.h"
#include "model/config_reader.h"
#include "model/gguf_model.h"
#include "model/quantized_source.h"
#include "model/random_source.h"

namespace coterie {
namespace {

std::string config_path(const std::string& directory) {
  if (!std::filesystem::exists(directory)) throw InvalidArgument(directory + ": no such file or directory");
  if (!std::filesystem::is_directory(directory)) {
    throw InvalidArgument(directory + ": neither a model's directory nor a .gguf file");
  }
  return (std::filesystem::path(directory) / "config.json").string();
}

// The end tokens of generation_config.json, where that file names any, go before those of config.json:
// models tuned for chat often name the end of a turn only there.
ModelConfig config_of_directory(const std::string& directory) {
  ModelConfig config = ModelConfig::from_file(config_path(directory));
  const auto path = std::filesystem::path(directory) / "generation_config.json";
  if (!std::filesystem::exists(path)) return config;
  const nlohmann::json object = parse_json(read_text_file(path.string()), path.string());
  const auto ids = read_token_ids(ConfigReader(object, path.string()), "eos_token_id");
  if (!ids.empty()) config.eos_token_ids = ids;
  config.validate(path.string());
  return config;
}

ModelConfig config_of_checkpoint(const CheckpointSource& checkpoint) {
  const std::string where = checkpoint.manifest_path() + ": state: model";
  const auto model = checkpoint.state().find("model");
  if (model == checkpoint.state().end()) throw CorruptFile(where + ": is missing");
  return ModelConfig::from_json(model->dump(), where);
}

// Every number of MXFP4 is one of bf16, too.
bool most_are_fp32(const TensorSource& file) {
  int64_t fp32 = 0, all = 0;
  for (const StoredTensor& tensor : file.tensors()) {
    all += tensor.num_elements();
    if (tensor.dtype == "F32") fp32 += tensor.num_elements();
  }
  return 2 * fp32 > all;
}

bool all_of_bf16(const TensorSource& file) {
  return std::ranges::all_of(file.tensors(), [](const StoredTensor& tensor) {
    return tensor.dtype == "BF16" || (tensor.dtype == "MXFP4" && tensor.has_codes);
  });
}

// What quantize_model() has written; another method was refused with the configuration, or is none of ours.
std::optional<WeightTypes> quantized_types_of(const std::string& directory) {
  const std::string path = config_path(directory);
  const nlohmann::json object = parse_json(read_text_file(path), path);
  const ConfigReader json(object, path);
  if (!json.has("quantization_config")) return std::nullopt;
  const ConfigReader quantization = json.object("quantization_config");
  if (quantization.text("quant_method") != "coterie") return std::nullopt;
  const std::string dtype = quantization.text("dtype"), attention = quantization.text("attention_dtype", ""),
                    head = quantization.text("head_dtype", "");
  try {
    return weight_types(dtype, attention, head);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": quantization_config." + error.what());
  }
}

}  // namespace

bool is_gguf_path(const std::string& path) { return path.ends_with(".gguf"); }

std::unique_ptr<TensorSource> open_tensors(const std::string& path) {
  if (is_gguf_path(path)) return std::make_unique<GgufSource>(path);
  if (CheckpointSource::is_checkpoint(path)) return std::make_unique<CheckpointSource>(path);
  return std::make_unique<SafetensorsSource>(path);
}

ModelConfig read_model_config(const std::string& path) {
  if (is_gguf_path(path)) return config_from_gguf(GgufSource(path));
  if (CheckpointSource::is_checkpoint(path)) return config_of_checkpoint(CheckpointSource(path));
  return config_of_directory(path);
}

bool StoredModel::all_bf16() const { return all_bf16_; }
bool StoredModel::mostly_fp32() const { return mostly_fp32_; }

StoredModel::StoredModel(const std::string& path, LoadFormat format) {
  CheckpointMap map;
  if (format == LoadFormat::kDummy) {
    if (is_gguf_path(path))
      throw InvalidArgument("load_format: 'dummy' needs a directory with a config.json, not " + path);
    config_ = config_of_directory(path);
    map = architecture_named(config_.architecture, path).checkpoint_map(config_);
    file_ = std::make_unique<RandomSource>(path, map);
  } else if (is_gguf_path(path)) {
    auto file = std::make_unique<GgufSource>(path);
    config_ = config_from_gguf(*file);
    map = map_of_gguf(*file, config_);
    file_ = std::move(file);
  } else if (CheckpointSource::is_checkpoint(path)) {
    auto file = std::make_unique<CheckpointSource>(path);
    config_ = config_of_checkpoint(*file);
    all_bf16_ = file->state().value("dtype", nlohmann::json()) == "bf16";  // the weights lie as fp32 masters
    map = architecture_named(config_.architecture, path).checkpoint_map(config_);
    map.ignored_prefix = "optimizer.";
    file_ = std::move(file);
  } else {
    config_ = config_of_directory(path);
    map = architecture_named(config_.architecture, path).checkpoint_map(config_);
    quantized_types_ = quantized_types_of(path);
    auto file = std::make_unique<SafetensorsSource>(path);
    view_ = std::make_unique<Mxfp4Source>(*file);
    if (quantized_types_) {
      quantized_view_ = std::make_unique<QuantizedSource>(*file, *view_, config_, *quantized_types_);
    }
    file_ = std::move(file);
  }
  const TensorSource& tensors = quantized_view_ ? *quantized_view_ : view_ ? *view_ : *file_;
  all_bf16_ |= all_of_bf16(tensors);
  mostly_fp32_ = !all_bf16_ && most_are_fp32(tensors);
  reader_ = std::make_unique<LogicalReader>(tensors, std::move(map));
}

}  // namespace coterie
