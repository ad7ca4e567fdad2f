// The optimizer of coterie.torch.initialize: ZeroOptimizer over parameters of a Python program, and its checkpoints.
// Whoever makes one keeps `world` and the parameters' groups of ranks alive. Errors as those of ZeroOptimizer and
// CheckpointSource.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "comm/process_group.h"
#include "train/language_model.h"
#include "train/settings.h"
#include "train/zero_optimizer.h"

namespace coterie {

// A parameter that is rows [first_row, first_row + the tensor's own) of logical_rows; 0 of 0: the whole logical tensor.
// `replicas`: as Parameter has it.
Parameter part_in_rows(const std::string& name, const at::Tensor& tensor, int64_t first_row, int64_t logical_rows,
                       ProcessGroup* replicas);

class ModuleOptimizer {
 public:
  // world: null for one rank.
  ModuleOptimizer(std::vector<Parameter> parameters, int64_t gradient_accumulation_steps,
                  const ParallelSettings& parallel, ProcessGroup* world);

  void accumulate_gradients() { optimizer_.accumulate_gradients(); }
  double step(const std::vector<AdamWSettings>& settings, double max_grad_norm, bool skips_overflow) {
    return optimizer_.step(settings, max_grad_norm, skips_overflow);
  }

  int64_t num_steps() const { return optimizer_.num_steps(); }
  void set_num_steps(int64_t steps) { optimizer_.set_num_steps(steps); }

  // This rank's part of checkpoint `name` in `directory`.
  void write_shard(const std::string& directory, const std::string& name) const;

  // Reads a checkpoint, written by any number of ranks, and returns its state as JSON. Without moments they and
  // num_steps stay as they are.
  std::string load(const std::string& path, bool moments);

 private:
  const std::vector<Parameter> parameters_;
  ProcessGroup* const world_;
  ZeroOptimizer optimizer_;
};

}  // namespace coterie
