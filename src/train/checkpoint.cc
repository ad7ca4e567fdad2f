#include "train/checkpoint.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "coterie/error.h"
#include "io/atomic_file.h"
#include "io/safetensors.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

fs::path checkpoints_dir(const std::string& output_dir) { return fs::path(output_dir) / "checkpoints"; }

std::string step_name(int64_t step) {
  const std::string digits = std::to_string(step);
  return "step-" + std::string(digits.size() < 8 ? 8 - digits.size() : 0, '0') + digits;
}

template <typename Visit>
void write_tensors(const std::string& path, const Visit& visit) {
  std::vector<TensorToWrite> tensors;
  visit([&](const std::string& name, const at::Tensor& tensor) {
    tensors.push_back({name, tensor.sizes().vec(), DType::kF32, tensor.const_data_ptr()});
  });
  write_safetensors(path, tensors);
}

template <typename Visit>
void read_tensors(const std::string& path, const Visit& visit) {
  const SafetensorsSource source(path);
  size_t num_read = 0;
  visit([&](const std::string& name, const at::Tensor& tensor) {
    const StoredTensor* stored = source.find(name);
    if (!stored || at::IntArrayRef(stored->shape) != tensor.sizes()) {
      throw InvalidArgument(path + ": " + name + ": " + (stored ? "has another shape" : "is missing"));
    }
    source.read(name, static_cast<float*>(tensor.mutable_data_ptr()));
    ++num_read;
  });
  if (num_read != source.tensors().size()) throw InvalidArgument(path + ": holds tensors of another model");
}

void remove_old(const fs::path& dir, int64_t keep) {
  std::vector<fs::path> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(dir)) {
    if (entry.is_directory() && entry.path().filename().string().starts_with("step-")) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i + static_cast<size_t>(keep) < found.size(); ++i) fs::remove_all(found[i]);
}

}  // namespace

std::string save_checkpoint(const std::string& output_dir, const ModelConfig& config, const AdamW& optimizer,
                            const TrainState& state, int64_t keep) {
  const fs::path dir = checkpoints_dir(output_dir);
  const fs::path target = dir / step_name(state.step);
  const fs::path aside = dir / ("tmp-" + step_name(state.step));
  fs::remove_all(aside);
  fs::create_directories(aside);
  write_tensors((aside / "model.safetensors").string(), [&](auto&& f) { optimizer.visit_masters(f); });
  write_tensors((aside / "optimizer.safetensors").string(), [&](auto&& f) { optimizer.visit_moments(f); });
  write_text_file((aside / "config.json").string(), config.to_json());
  const nlohmann::json json = {{"step", state.step}, {"train_seconds", state.train_seconds}};
  write_text_file((aside / "state.json").string(), json.dump(2) + "\n");
  fs::remove_all(target);  // the same step saved again, by a run that was resumed and stopped at once
  fs::rename(aside, target);
  sync_directory(dir.string());
  write_text_file((dir / "latest").string(), target.filename().string() + "\n");
  remove_old(dir, keep);
  return target.string();
}

std::optional<TrainState> load_latest_checkpoint(const std::string& output_dir, const ModelConfig& config,
                                                 AdamW& optimizer) {
  const fs::path dir = checkpoints_dir(output_dir);
  if (!fs::exists(dir / "latest")) return std::nullopt;
  std::string name = read_text_file((dir / "latest").string());
  while (!name.empty() && name.back() == '\n') name.pop_back();
  const fs::path source = dir / name;
  const std::string config_path = (source / "config.json").string();
  if (ModelConfig::from_file(config_path).to_json() != config.to_json()) {
    throw InvalidArgument(config_path + ": the checkpoint is of another model configuration");
  }
  const std::string state_path = (source / "state.json").string();
  const auto json = nlohmann::json::parse(read_text_file(state_path), nullptr, false);
  if (!json.is_object() || !json.contains("step") || !json.contains("train_seconds")) {
    throw CorruptFile(state_path + ": not a training state");
  }
  read_tensors((source / "model.safetensors").string(), [&](auto&& f) { optimizer.visit_masters(f); });
  read_tensors((source / "optimizer.safetensors").string(), [&](auto&& f) { optimizer.visit_moments(f); });
  optimizer.publish_masters();
  optimizer.set_num_steps(json["step"].get<int64_t>());
  return TrainState{json["step"].get<int64_t>(), json["train_seconds"].get<double>()};
}

}  // namespace coterie
