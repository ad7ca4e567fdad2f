// What training holds per rank beside activations: counted from shapes alone, for any number of ranks, and measured on
// the real objects with ranks that are threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "model/config.h"
#include "train/settings.h"
#include "train/training_bytes.h"
#include "train/zero_partition.h"

namespace coterie {

struct MemoryCase {
  ModelConfig config;
  DType dtype = DType::kBF16;  // of the model's matrices: fp32 or bf16
  int64_t num_ranks = 1;
  ParallelSettings parallel = {};
  int64_t passes = 1;  // backward passes of a step
};

// The parameters of a model as one of its ranks holds them. InvalidArgument: a degree that cannot be
// (expert_layout.h).
std::vector<SizedParameter> parameters_of_rank(const MemoryCase& layout, int64_t rank);

// What a ZeroOptimizer and its model hold, with the gradients of backward passes that finish parameters in the reverse
// order of their list.
TrainingBytes planned_bytes(const std::vector<SizedParameter>& parameters, const ParallelSettings& parallel,
                            int64_t passes);

// Of every rank. Neither makes weights nor needs other ranks.
std::vector<TrainingBytes> plan_memory(const MemoryCase& layout);

// Of every rank, and for each of the stages, in this order: makes the model and the optimizer on threads of this
// process, runs the forward and backward passes of a step over a few tokens, and adds up the tensors.
std::vector<std::vector<TrainingBytes>> measure_memory(const MemoryCase& layout, const std::vector<int64_t>& stages);

}  // namespace coterie
