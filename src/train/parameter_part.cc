#include "train/parameter_part.h"

namespace coterie {
namespace {

bool keeps_fp32(const std::string& name) {
  return is_norm(name) || is_choice_bias(name) || name.ends_with(".bias") || name.ends_with("router.weight") ||
         name.ends_with("mix.weight");
}

}  // namespace

bool is_norm(const std::string& name) { return name.find("norm.weight") != std::string::npos; }

bool is_choice_bias(const std::string& name) { return name.ends_with(".choice_bias"); }

int64_t layer_of_experts(const std::string& name) {
  static const std::string prefix = "model.layers.";
  if (!name.starts_with(prefix) || name.find(".experts.") == std::string::npos) return -1;
  return std::stoll(name.substr(prefix.size()));
}

ParameterPart part_of(const TensorSpec& spec, DType dtype, const ExpertRanks* experts) {
  ParameterPart part{
      .shape = spec.shape, .dtype = keeps_fp32(spec.name) ? DType::kF32 : dtype, .trained = !is_choice_bias(spec.name)};
  if (experts) {
    part.first_row = experts->first_expert;
    part.shape[0] = experts->num_experts;
  }
  return part;
}

}  // namespace coterie
