// Where and how an optimizer keeps its states between steps: in memory, or in a scratch file that is mapped into it (so
// that states may exceed memory, at the speed of the disk); moments in fp32, or in bf16, half the bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "kernels/kernel_table.h"

namespace coterie {

struct OptimizerStateSettings {
  std::string moments_dtype = "fp32";  // or "bf16"
  std::string offload_path;            // a directory for scratch files, which have no name and end with the process
};

// Zeros [count]. InvalidArgument when the directory can't hold them: "parallel.offload_optimizer: ...".
at::Tensor make_state(int64_t count, at::ScalarType dtype, const std::string& offload_path);

// One step of AdamW on moments in bf16: in fp32, and rounded at random (KernelTable::round_randomly_row), because the
// second moment moves by 1 - beta2 of the way, which rounding to the nearest would lose for beta2 above 1 - 2^-8. The
// mean over the steps is that of fp32 moments; a single one is off by 2^-8 of it. `key`: of these elements in this
// step. row.exp_avg and row.exp_avg_sq are set here.
void adamw_row_bf16_moments(AdamWRow row, BFloat16* exp_avg, BFloat16* exp_avg_sq, uint32_t key);

}  // namespace coterie
