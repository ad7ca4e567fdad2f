#include "train/module_optimizer.h"

#include <c10/util/accumulate.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "train/checkpoint.h"

namespace coterie {
namespace {

constexpr const char* kMoments = "optimizer.";  // what their names begin with

}  // namespace

Parameter part_in_rows(const std::string& name, const at::Tensor& tensor, int64_t first_row, int64_t logical_rows,
                       ProcessGroup* replicas) {
  Parameter parameter{.name = name, .tensor = tensor, .logical_shape = tensor.sizes().vec(), .replicas = replicas};
  if (logical_rows > 0) {
    parameter.logical_shape[0] = logical_rows;
    parameter.first_element = first_row * c10::multiply_integers(tensor.sizes().slice(1));
  }
  return parameter;
}

ModuleOptimizer::ModuleOptimizer(std::vector<Parameter> parameters, int64_t gradient_accumulation_steps,
                                 const ParallelSettings& parallel, ProcessGroup* world)
    : parameters_(std::move(parameters)),
      world_(world),
      optimizer_(parameters_, gradient_accumulation_steps, parallel, world) {}

void ModuleOptimizer::write_shard(const std::string& directory, const std::string& name) const {
  CheckpointDirectory(directory).write_shard(name, world_ ? world_->rank() : 0, pieces_of(optimizer_.state_views()));
}

std::string ModuleOptimizer::load(const std::string& path, bool moments) {
  const CheckpointSource source(path);
  std::vector<StateView> views = optimizer_.state_views();
  if (!moments) std::erase_if(views, [](const StateView& view) { return view.name.starts_with(kMoments); });
  load_views(source, views, world_, moments ? std::nullopt : std::optional<std::string>(kMoments));
  optimizer_.publish_masters();
  return source.state().dump();
}

}  // namespace coterie
