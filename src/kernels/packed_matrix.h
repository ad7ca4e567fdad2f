// B [N, K] rearranged into the panels that the micro-kernel of the active ISA reads in order.
#pragma once

#include <cstdint>
#include <optional>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/matrix.h"
#include "kernels/panels.h"
#include "kernels/quantized.h"

namespace coterie {

struct KernelTable;

// What panels hold. With `gated`, B is [2N, K], gate rows first, and only fits problems that are gated too: a panel
// then holds gate and up of the same columns.
struct PackedShape {
  PanelType type = PanelType::kF32;
  int64_t rows = 0;  // of B: N, or 2N when gated
  int64_t cols = 0;  // K
  bool gated = false;
  bool compact = false;  // bf16 alone, see panels.h: 12 bits an element

  int64_t panel_units(int64_t columns) const;  // 32 bits each, of a panel with so many columns
  size_t bytes() const;                        // of panels of the active ISA
};

// Immutable after packing; may be read by any number of threads.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // b: any strides; panels of its type, or converted to fp32 or bf16 as the shape says. Into `panels` of
  // PackedShape::bytes(), or into new memory when it is empty.
  PackedMatrix(const ConstMatrix& b, ThreadPool& pool, bool gated = false);
  PackedMatrix(const PackedShape& shape, const ConstMatrix& b, ThreadPool& pool, AlignedBuffer panels = {});
  PackedMatrix(const QuantizedView& b, ThreadPool& pool, bool gated = false, AlignedBuffer panels = {});
  // Panels of the active ISA that are there already.
  PackedMatrix(const PackedShape& shape, AlignedBuffer panels);

  // The same in compact panels, in memory as above, or nothing where they cannot be.
  std::optional<PackedMatrix> compacted(ThreadPool& pool, AlignedBuffer panels = {}) const;

  // Row n in fp32, as products see it, into out_K. Not of gated ones. One element after the other: it is for a few rows
  // at a time, as those of embeddings are.
  void read_row(int64_t n, float* out_K) const;

  // The same panels have moved there; their memory belongs to somebody else.
  void point_to(const void* panels);

  const PackedShape& shape() const { return shape_; }
  int64_t rows() const { return shape_.rows; }
  int64_t cols() const { return shape_.cols; }
  PanelType type() const { return shape_.type; }
  // What the other operand may be held in without a loss (to speak of, when quantized).
  DType dtype() const { return shape_.type == PanelType::kF32 ? DType::kF32 : DType::kBF16; }
  bool gated() const { return shape_.gated; }
  const KernelTable* kernels() const { return kernels_; }  // whose panels these are
  const void* data() const { return panels_.data(); }
  size_t bytes() const { return panels_.size(); }

 private:
  PackedShape shape_;
  AlignedBuffer panels_;
  const KernelTable* kernels_ = nullptr;
};

}  // namespace coterie
