// One training step of a layout (ranks, expert parallelism, ZeRO) against the same step on one rank.
#pragma once

#include <functional>
#include <string>

#include "comm/process_group.h"
#include "model/config.h"
#include "train/settings.h"
#include "train/zero_optimizer.h"

namespace coterie {

class Trainer;

// A tensor and its error.
struct WorstTensor {
  std::string tensor;
  double error = 0;
};

// Relative errors of a layout, the same on all ranks.
struct VerifyReport {
  double loss = 0;
  double norm = 0;  // of all gradients, before clipping
  // |difference| / |gradient| in the 2-norm. Where a gradient is all but zero in exact arithmetic (a key's bias), what
  // remains is rounding: its elements count as a hundredth of the model's typical one, at least.
  WorstTensor gradient;
  // Largest difference of an updated weight as a share of the learning rate, which is what AdamW's first step moves a
  // weight by; of elements whose gradient stands well above the rounding that decides its sign, and beyond the rounding
  // of the weight itself. Weights that were not updated have the error 1.
  WorstTensor weight;
  // Elements of a gradient that no rank has, or several have; 0 when every one arrives once.
  WorstTensor uncounted;
};

// What an error may be: layouts add the same numbers in another order, which costs up to 1e-5 of a gradient in fp32
// (sums of some thousand terms, 2^-24 each, over a few dozen layers); in bf16 every rank rounds its own gradients, and
// a choice of experts may differ.
struct VerifyTolerance {
  double loss = 0, gradient = 0, norm = 0, weight = 0;
  static VerifyTolerance of(const std::string& dtype);
};

// Where tests plant their faults.
struct VerifyFaults {
  std::function<void(Trainer& trainer, double& norm)> before_update;
  std::function<void(Trainer& trainer)> after_update;
};

// Collective. Both steps are at the full learning rate; rank 0 does the one-rank step while the others wait.
VerifyReport verify_step(const ModelConfig& config, const RunSettings& settings, ProcessGroup& world,
                         const VerifyFaults& faults = {});

bool within(const VerifyReport& report, const VerifyTolerance& tolerance);

}  // namespace coterie
