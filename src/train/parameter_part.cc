#include "train/parameter_part.h"

namespace coterie {
namespace {

bool keeps_fp32(const std::string& name) {
  return is_norm(name) || is_choice_bias(name) || name.ends_with(".bias") || name.ends_with("router.weight") ||
         name.ends_with("mix.weight");
}

void take_part(ParameterPart& part, const TensorSpec& spec, const ExpertRanks& experts, bool gated) {
  part.shape[0] = experts.num_experts;
  if (experts.slices > 1) {
    const size_t axis = spec.name.ends_with("down.weight") ? 2 : 1;
    const bool halves = gated && spec.name.find(".up.") != std::string::npos;
    int64_t row = halves ? spec.shape[1] / 2 : spec.shape[axis];
    for (size_t i = axis + 1; i < spec.shape.size(); ++i) row *= spec.shape[i];
    part.order = {row, row / experts.slices};
    part.shape[axis] /= experts.slices;
  }
  const int64_t of_an_expert = spec.num_elements() / spec.shape[0] / experts.slices;
  part.first_element = (experts.slice * spec.shape[0] + experts.first_expert) * of_an_expert;
}

}  // namespace

bool is_norm(const std::string& name) { return name.find("norm.weight") != std::string::npos; }

bool is_choice_bias(const std::string& name) { return name.ends_with(".choice_bias"); }

int64_t layer_of_experts(const std::string& name) {
  static const std::string prefix = "model.layers.";
  if (!name.starts_with(prefix) || name.find(".experts.") == std::string::npos) return -1;
  return std::stoll(name.substr(prefix.size()));
}

ParameterPart part_of(const TensorSpec& spec, const ModelConfig& config, DType dtype, const ExpertRanks* experts) {
  ParameterPart part{
      .shape = spec.shape, .dtype = keeps_fp32(spec.name) ? DType::kF32 : dtype, .trained = !is_choice_bias(spec.name)};
  if (experts) take_part(part, spec, *experts, config.gated_mlp);
  return part;
}

}  // namespace coterie
