// Sums and maxima of what several ranks hold.
#pragma once

#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "comm/process_group.h"

namespace coterie {

// out[count] = inputs[0] + inputs[1] + ..., in this order; fp32, bf16 (in fp32, rounded once) or int64 (modulo 2^64).
// out may be one of the inputs, else they don't overlap.
void reduce(std::span<const void* const> inputs, void* out, int64_t count, DType dtype, ReduceOp op);

}  // namespace coterie
