// Which part of a model's logical tensors (model/tensors.h) a rank holds, and of what type: what LanguageModel makes
// and memory_plan.h counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "model/tensors.h"
#include "train/expert_layout.h"

namespace coterie {

bool is_norm(const std::string& name);
bool is_choice_bias(const std::string& name);  // moved by LanguageModel::update_choice_biases() and not by gradients

// "model.layers.3.experts.up.weight" -> 3; -1 when the tensor is not of routed experts.
int64_t layer_of_experts(const std::string& name);

struct ParameterPart {
  std::vector<int64_t> shape;
  int64_t first_row = 0;  // of the logical tensor
  DType dtype = DType::kF32;
  bool trained = true;  // by gradients
};

// dtype: of the model's matrices. Vectors, routers and mixes are fp32 also in a bf16 model, as in the engine: they are
// small, and what they decide is discrete. `experts`: this rank's part of the layer whose experts the tensor belongs
// to; null: all of the tensor.
ParameterPart part_of(const TensorSpec& spec, DType dtype, const ExpertRanks* experts);

}  // namespace coterie
