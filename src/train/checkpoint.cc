#include "train/checkpoint.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/check.h"
#include "comm/process_group.h"
#include "coterie/error.h"
#include "io/checkpoint_manifest.h"
#include "io/printable.h"
#include "train/views.h"

namespace coterie {
namespace {

using nlohmann::json;

std::string directory_of(const RunSettings& settings) {
  return (std::filesystem::path(settings.train.output_dir) / "checkpoints").string();
}

// What the data order and the random choices follow from, beside the step.
json order_of(const RunSettings& settings) {
  return {{"train.seed", settings.train.seed},
          {"train.batch_size", settings.train.batch_size},
          {"data.sequence_length", settings.data.sequence_length}};
}

// Another model or another order of the data would go on with other numbers, silently.
void check_same_run(const json& state, const std::string& path, const ModelConfig& config,
                    const RunSettings& settings) {
  if (state.value("model", json()) != json::parse(config.to_json())) {
    throw InvalidArgument(path + ": state: model: the checkpoint is of another model configuration");
  }
  const json order = state.value("order", json::object());
  const json wanted = order_of(settings);
  for (const auto& [key, value] : wanted.items()) {
    const json found = order.is_object() ? order.value(key, json()) : json();
    if (found != value) {
      throw InvalidArgument(path + ": state: " + key + ": the checkpoint was made with " +
                            printable(found.dump(-1, ' ', true)) + ", the run has " + value.dump());
    }
  }
}

TrainState read_state(const json& state, const std::string& path) {
  const json step = state.value("step", json()), seconds = state.value("train_seconds", json());
  if (!step.is_number_unsigned()) throw CorruptFile(path + ": state: step: is not a whole number");
  if (!seconds.is_number()) throw CorruptFile(path + ": state: train_seconds: is not a number");
  return {step.get<int64_t>(), seconds.get<double>()};
}

// The elements that this rank answers for, as a manifest.
CheckpointManifest held_by(const std::vector<StateView>& views, int rank) {
  CheckpointManifest held;
  for (const StateView& view : views) {
    CheckpointTensor& tensor = held.tensors[view.name];
    tensor.shape = view.shape;
    tensor.order = view.order;
    if (view.writes && view.values.numel() > 0) {
      const std::string holder = "rank-" + std::to_string(rank) + ".safetensors";
      tensor.pieces.push_back({holder, view.first_element, view.values.numel()});
    }
  }
  return held;
}

// The texts of all ranks, in their order.
std::vector<std::string> all_gather_text(ProcessGroup& group, const std::string& text, const std::string& label) {
  std::vector<int64_t> sizes(static_cast<size_t>(group.size()));
  const auto size = static_cast<int64_t>(text.size());
  group.all_gather(&size, sizes.data(), sizeof(size), label);
  const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  std::string padded = text, gathered(static_cast<size_t>(longest) * sizes.size(), '\0');
  padded.resize(static_cast<size_t>(longest));
  group.all_gather(padded.data(), gathered.data(), longest, label);
  std::vector<std::string> texts;
  for (size_t rank = 0; rank < sizes.size(); ++rank) {
    texts.push_back(gathered.substr(rank * static_cast<size_t>(longest), static_cast<size_t>(sizes[rank])));
  }
  return texts;
}

CheckpointManifest held_by_all(const std::vector<StateView>& views, ProcessGroup* group, const std::string& source) {
  if (!group) return held_by(views, 0);
  CheckpointManifest all;
  const std::string own = manifest_text(held_by(views, group->rank()));
  for (const std::string& text : all_gather_text(*group, own, "load checkpoint")) {
    add_pieces(all, parse_manifest(text, source), source);
  }
  return all;
}

std::string shape_text(const std::vector<int64_t>& shape) { return json(shape).dump(); }

// Every logical tensor arrives exactly once, and all that is stored arrives, but for what is unwanted.
void check_arrival(const CheckpointSource& source, CheckpointManifest wanted,
                   const std::optional<std::string>& unwanted) {
  const std::string& path = source.path();
  check_coverage(wanted, path + ": of the run's layout");
  for (const auto& [name, tensor] : wanted.tensors) {
    const StoredTensor* stored = source.find(name);
    if (!stored) throw InvalidArgument(path + ": tensor " + printable(name) + ": is missing");
    if (stored->shape != tensor.shape) {
      throw InvalidArgument(path + ": tensor " + printable(name) + ": has shape " + shape_text(stored->shape) +
                            ", the model's is " + shape_text(tensor.shape));
    }
  }
  for (const StoredTensor& stored : source.tensors()) {
    if (!wanted.tensors.contains(stored.name) && !(unwanted && stored.name.starts_with(*unwanted))) {
      throw InvalidArgument(path + ": tensor " + printable(stored.name) + ": is in no part of the model");
    }
  }
}

void load_view(const CheckpointSource& source, const StateView& view) {
  const at::Tensor target = view.values;
  const at::Tensor read = target.scalar_type() == at::kFloat ? target : at::empty(target.sizes(), at::kFloat);
  source.read_range(view.name, view.first_element, read.numel(), read.mutable_data_ptr<float>(), view.order);
  if (!read.is_same(target)) target.copy_(read);
}

PieceToWrite piece_of(const StateView& view, const at::Tensor& values) {
  COTERIE_CHECK(values.is_contiguous(), "a view of a checkpoint is contiguous: " + view.name);
  const int64_t count = view.writes ? values.numel() : 0;
  const void* const data = count > 0 ? values.const_data_ptr() : nullptr;
  return {view.name, view.shape, dtype_of(values), view.first_element, count, data, view.order};
}

}  // namespace

std::vector<PieceToWrite> pieces_of(const std::vector<StateView>& views) {
  std::vector<PieceToWrite> pieces;
  for (const StateView& view : views) pieces.push_back(piece_of(view, view.values));
  return pieces;
}

void load_views(const CheckpointSource& source, const std::vector<StateView>& views, ProcessGroup* group,
                const std::optional<std::string>& unwanted) {
  c10::NoGradGuard no_grad;
  check_arrival(source, held_by_all(views, group, source.path()), unwanted);
  for (const StateView& view : views) load_view(source, view);
}

struct CheckpointSaver::Snapshot {
  int64_t step = 0;
  json state;
  std::vector<at::Tensor> values;  // copies
  std::vector<PieceToWrite> pieces;

  void add(const StateView& view) {
    values.push_back(view.writes ? view.values.clone() : view.values);
    pieces.push_back(piece_of(view, values.back()));
  }
};

CheckpointSaver::CheckpointSaver(const ModelConfig& config, const RunSettings& settings, ProcessGroup* group)
    : directory_(directory_of(settings)), config_json_(config.to_json()), settings_(settings), group_(group) {}

CheckpointSaver::~CheckpointSaver() = default;  // the thread is told to stop waiting for others, and joined

void CheckpointSaver::start(const TrainState& state, const std::vector<StateView>& views) {
  finish();
  c10::NoGradGuard no_grad;
  if (!group_ || group_->rank() == 0) directory_.begin(CheckpointDirectory::step_name(state.step));
  if (group_) group_->barrier("checkpoint of step " + std::to_string(state.step));
  Snapshot snapshot{.step = state.step,
                    .state = {{"step", state.step},
                              {"train_seconds", state.train_seconds},
                              {"sequences", state.step * settings_.train.batch_size},
                              {"order", order_of(settings_)},
                              {"dtype", settings_.train.dtype},
                              {"model", json::parse(config_json_)}}};
  for (const StateView& view : views) snapshot.add(view);
  done_ = false;
  thread_ = std::jthread([this, snapshot = std::move(snapshot)](std::stop_token stop) {
    try {
      write(snapshot, stop);
    } catch (...) {
      failure_ = std::current_exception();
    }
    done_ = true;
  });
}

void CheckpointSaver::write(const Snapshot& snapshot, std::stop_token stop) {
  const int rank = group_ ? group_->rank() : 0;
  const std::string name = CheckpointDirectory::step_name(snapshot.step);
  directory_.write_shard(name, rank, snapshot.pieces);
  if (rank != 0) return;
  last_path_ = directory_.commit(
      name,
      {.num_ranks = group_ ? group_->size() : 1, .state = snapshot.state, .keep = settings_.train.keep_checkpoints},
      stop);
}

void CheckpointSaver::check() {
  if (!done_) return;
  if (const std::exception_ptr failure = std::exchange(failure_, nullptr)) std::rethrow_exception(failure);
}

std::string CheckpointSaver::finish() {
  if (thread_.joinable()) thread_.join();
  check();
  return last_path_;
}

std::string latest_checkpoint(const RunSettings& settings) {
  const std::optional<std::string> path = CheckpointDirectory(directory_of(settings)).latest();
  if (!path) throw InvalidArgument(directory_of(settings) + ": holds no checkpoint");
  return *path;
}

std::optional<TrainState> load_latest_checkpoint(const ModelConfig& config, const RunSettings& settings,
                                                 const std::vector<StateView>& views, ProcessGroup* group) {
  const std::optional<std::string> path = CheckpointDirectory(directory_of(settings)).latest();
  if (!path) return std::nullopt;
  const CheckpointSource source(*path);
  check_same_run(source.state(), source.manifest_path(), config, settings);
  load_views(source, views, group);
  return read_state(source.state(), source.manifest_path());
}

}  // namespace coterie
