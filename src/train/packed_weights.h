// Panels of the weights that torch's modules hold as they are, kept for products to come: as many bytes again (three
// quarters of them where bf16 lies in compact panels), for products that read memory as the engine's do.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "base/memory.h"
#include "kernels/packed_matrix.h"

namespace coterie {

// The matrices of a weight [E, N, K], or the one of [N, K], with any strides.
class WeightPanels {
 public:
  WeightPanels(const at::Tensor& weight, bool gated, ThreadPool& pool);  // gated: see PackedShape

  // That packing it takes: compact panels are made of plain ones, matrix by matrix.
  static size_t most_bytes(const at::Tensor& weight, bool gated);

  const PackedMatrix* matrices() const { return matrices_.data(); }
  size_t bytes() const { return memory_.size(); }

 private:
  bool pack(const at::Tensor& weight, const PackedShape& shape, ThreadPool& pool);

  AlignedBuffer memory_;
  std::vector<PackedMatrix> matrices_;
};

// How many bytes of panels to keep at most; 0, as in the beginning, lets go of all.
void keep_packed_weights(size_t max_bytes);

// Bytes of the panels that are kept.
size_t packed_weight_bytes();

// The panels of a weight: packed when it is used a second time without a change, and again after changes. Null where
// none are kept: at a first use, above the bound, and for tensors of inference mode, which don't count their changes.
// Changes are what torch counts (Tensor._version). Nobody sees what is written through `.data` or a pointer, and
// torch's fused optimizers write so: whoever uses them raises the counter. Any thread.
std::shared_ptr<const WeightPanels> packed_weight(const at::Tensor& weight, bool gated = false);

}  // namespace coterie
