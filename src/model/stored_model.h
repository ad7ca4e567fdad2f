// A model as it lies on disk, whatever its format: a directory with config.json and safetensors, a
// training checkpoint, or a .gguf file. Opening compares every tensor's name and shape with the configuration; no
// weight is read yet. InvalidArgument and CorruptFile say what is wrong, and where.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "io/tensor_source.h"
#include "model/checkpoint_map.h"
#include "model/config.h"
#include "model/weight_types.h"

namespace coterie {

// kDummy: a directory's config.json alone is read, and weights are random numbers (random_source.h).
enum class LoadFormat { kAuto, kDummy };

class StoredModel {
 public:
  explicit StoredModel(const std::string& path, LoadFormat format = LoadFormat::kAuto);

  const ModelConfig& config() const { return config_; }
  const LogicalReader& tensors() const { return *reader_; }
  // No tensor of the file needs more; of a checkpoint: whether bf16 weights were trained.
  bool all_bf16() const;
  // Whether most of its weights have 32 bits; a few often do (routers, norms) where the others have 16 or fewer.
  bool mostly_fp32() const;
  // In which its matrices lie where it was written by quantize_model(), as config.json's quantization_config says.
  const std::optional<WeightTypes>& quantized_types() const { return quantized_types_; }

 private:
  ModelConfig config_;
  bool all_bf16_ = false, mostly_fp32_ = false;
  std::optional<WeightTypes> quantized_types_;
  std::unique_ptr<TensorSource> file_;
  std::unique_ptr<TensorSource> view_;            // of the file, with pairs of MXFP4 as one; or none
  std::unique_ptr<TensorSource> quantized_view_;  // of that one: matrices in codes of our own; or none
  std::unique_ptr<LogicalReader> reader_;
};

// The tensors of a directory, a training checkpoint, a .safetensors or a .gguf file, under their own names.
std::unique_ptr<TensorSource> open_tensors(const std::string& path);

// The configuration alone.
ModelConfig read_model_config(const std::string& path);

bool is_gguf_path(const std::string& path);

}  // namespace coterie
