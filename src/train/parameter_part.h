// Which part of a model's logical tensors (model/tensors.h) a rank holds, and of what type: what LanguageModel makes
// and memory_plan.h counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "io/element_order.h"
#include "model/config.h"
#include "model/tensors.h"
#include "train/expert_layout.h"

namespace coterie {

bool is_norm(const std::string& name);
bool is_choice_bias(const std::string& name);  // moved by LanguageModel::update_choice_biases() and not by gradients

// "model.layers.3.experts.up.weight" -> 3; -1 when the tensor is not of routed experts.
int64_t layer_of_experts(const std::string& name);

struct ParameterPart {
  std::vector<int64_t> shape;
  ElementOrder order = {};    // of the logical tensor's elements, among which the part is a range
  int64_t first_element = 0;  // of the range
  DType dtype = DType::kF32;
  bool trained = true;  // by gradients
};

// dtype: of the model's matrices. Vectors, routers and mixes are fp32 also in a bf16 model, as in the engine: they are
// small, and what they decide is discrete. `experts`: this rank's part of the layer whose experts the tensor belongs
// to; null: all of the tensor.
//
// A slice of an expert is a stretch of its intermediate units (DeepSpeed-MoE, section 5): rows of up, in either half of
// a gated one; columns of down; and an equal stretch of down's bias, which belongs to no unit. So every element of
// every tensor lies in one slice.
ParameterPart part_of(const TensorSpec& spec, const ModelConfig& config, DType dtype, const ExpertRanks* experts);

}  // namespace coterie
