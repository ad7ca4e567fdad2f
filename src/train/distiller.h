// Mixture-of-Students (DeepSpeed-MoE section 4): the student learns from the labels and, for the
// first part of the run, from its teacher's distribution over the same tokens ("staged": kept on to
// the end, the KL term costs the smaller student more cross-entropy than it gives).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "train/language_model.h"
#include "train/ops.h"
#include "train/settings.h"

namespace coterie {

class Distiller {
 public:
  // Loads the teacher. InvalidArgument when it and the student have different vocabularies.
  Distiller(const DistillSettings& settings, const ModelConfig& student, at::ScalarType dtype, int64_t total_steps);

  // The teacher's view of a batch [B, S], in evaluation mode; nothing once the KL term is off.
  std::optional<TeacherSignal> signal(const at::Tensor& tokens_BS, int64_t step) const;

  // Copies into the student every tensor that it shares with the teacher; the student's layer i is
  // the teacher's i-th layer of those that settings.drop_layers leaves.
  void initialize(const LanguageModel& student) const;

 private:
  DistillSettings settings_;
  LanguageModel teacher_;
  int64_t stop_step_;
};

}  // namespace coterie
