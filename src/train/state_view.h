// What an optimizer and a checkpoint agree on: which elements of which logical tensors a rank holds, and where.
// Saving reads the values, loading writes them; neither knows how the ranks share the work.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "io/element_order.h"

namespace coterie {

struct StateView {
  std::string name;            // logical: a parameter's (its fp32 master), "optimizer.exp_avg.<parameter>", ...
  std::vector<int64_t> shape;  // of the logical tensor
  int64_t first_element = 0;   // the values are [first_element, first_element + numel) of it, in `order`
  at::Tensor values;           // fp32 or bf16, contiguous, of any shape; it may be empty
  bool writes = true;          // of the ranks that hold the same elements, this one saves them
  ElementOrder order = {};     // of the tensor's elements, the same on all ranks
};

}  // namespace coterie
