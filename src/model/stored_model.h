// A model as it lies on disk, whatever its format: a directory with config.json and safetensors, a
// training checkpoint, or a .gguf file. Opening compares every tensor's name and shape with the configuration; no
// weight is read yet. InvalidArgument and CorruptFile say what is wrong, and where.
#pragma once

#include <memory>
#include <string>

#include "io/tensor_source.h"
#include "model/checkpoint_map.h"
#include "model/config.h"

namespace coterie {

// kDummy: a directory's config.json alone is read, and weights are random numbers (random_source.h).
enum class LoadFormat { kAuto, kDummy };

class StoredModel {
 public:
  explicit StoredModel(const std::string& path, LoadFormat format = LoadFormat::kAuto);

  const ModelConfig& config() const { return config_; }
  const LogicalReader& tensors() const { return *reader_; }
  bool all_bf16() const;  // every tensor of the file; of a checkpoint: whether bf16 weights were trained

 private:
  ModelConfig config_;
  bool all_bf16_ = false;
  std::unique_ptr<TensorSource> file_;
  std::unique_ptr<TensorSource> view_;  // of the file, with pairs of MXFP4 as one; or none
  std::unique_ptr<LogicalReader> reader_;
};

// The tensors of a directory, a training checkpoint, a .safetensors or a .gguf file, under their own names.
std::unique_ptr<TensorSource> open_tensors(const std::string& path);

// The configuration alone.
ModelConfig read_model_config(const std::string& path);

bool is_gguf_path(const std::string& path);

}  // namespace coterie
