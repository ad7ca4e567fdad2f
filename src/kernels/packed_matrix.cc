#include "kernels/packed_matrix.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/check.h"
#include "kernels/gemm_plan.h"
#include "kernels/kernel_table.h"

namespace coterie {
namespace {

int64_t panel_width(const PackedShape& shape) {
  return shape.gated ? active_kernels().width : active_kernels().panel_columns();
}
int64_t num_columns(const PackedShape& shape) { return shape.gated ? shape.rows / 2 : shape.rows; }
int64_t num_panels(const PackedShape& shape) { return ceil_div(num_columns(shape), panel_width(shape)); }
int64_t active_panel_units(const PackedShape& shape) { return shape.panel_units(active_kernels().panel_columns()); }

}  // namespace

int64_t PackedShape::panel_units(int64_t columns) const {
  return compact ? CompactPanel{cols, columns}.size() : b_panel_units(type, cols, columns);
}

size_t PackedShape::bytes() const { return static_cast<size_t>(num_panels(*this) * active_panel_units(*this)) * 4; }

PackedMatrix::PackedMatrix(const PackedShape& shape, AlignedBuffer panels)
    : shape_(shape), panels_(std::move(panels)), kernels_(&active_kernels()) {
  COTERIE_CHECK(!shape.compact || shape.type == PanelType::kBF16, "only panels in bf16 are made compact");
  COTERIE_CHECK(!shape.gated || shape.rows % 2 == 0, "a gated B has an even number of rows");
  if (!panels_.data()) panels_ = AlignedBuffer(shape.bytes());
  COTERIE_CHECK(panels_.size() == shape.bytes(), "the panels are not of this shape");
}

void PackedMatrix::point_to(const void* panels) {
  panels_ = AlignedBuffer::borrowed(const_cast<void*>(panels), panels_.size());
}

PackedMatrix::PackedMatrix(const ConstMatrix& b, ThreadPool& pool, bool gated)
    : PackedMatrix({panel_type(b.dtype), b.rows, b.cols, gated}, b, pool) {}

PackedMatrix::PackedMatrix(const PackedShape& shape, const ConstMatrix& b, ThreadPool& pool, AlignedBuffer panels)
    : PackedMatrix(shape, std::move(panels)) {
  COTERIE_CHECK(!is_quantized(shape.type) && shape.rows == b.rows && shape.cols == b.cols, "B is not of this shape");
  const PackSource source = {b.data, b.dtype, b.rows, b.cols, b.row_stride, b.col_stride, nullptr, nullptr};
  const PanelsB all = {kernels_, source, type(), shape.gated, false, num_columns(shape_)};
  const int64_t units = all.panel_units(), group = all.group();
  pool.run(ceil_div(all.count(), group), [&](int64_t task, int) {
    const int64_t first = task * group, last = std::min(first + group, all.count());
    all.pack(first, last, panels_.as<uint32_t>() + first * units);
  });
}

PackedMatrix::PackedMatrix(const QuantizedView& b, ThreadPool& pool, bool gated, AlignedBuffer panels)
    : PackedMatrix({b.type, b.rows, b.cols, gated}, std::move(panels)) {
  const int64_t units = active_panel_units(shape_);
  pool.run(num_panels(shape_), [&](int64_t p, int) {
    kernels_->pack_quantized_b(b, num_columns(shape_), gated, p, p + 1, panels_.as<uint32_t>() + p * units);
  });
}

std::optional<PackedMatrix> PackedMatrix::compacted(ThreadPool& pool, AlignedBuffer panels) const {
  if (type() != PanelType::kBF16 || shape_.compact) return std::nullopt;
  PackedShape shape = shape_;
  shape.compact = true;
  PackedMatrix result(shape, std::move(panels));
  const CompactPanel panel = {cols(), kernels_->panel_columns()};
  const int64_t units = active_panel_units(shape_);
  std::atomic<bool> all = true;
  pool.run(num_panels(shape_), [&](int64_t p, int) {
    uint32_t* const out = result.panels_.as<uint32_t>() + p * panel.size();
    if (!kernels_->compact_panel(panel, panels_.as<uint32_t>() + p * units, out)) all = false;
  });
  return all ? std::optional(std::move(result)) : std::nullopt;
}

}  // namespace coterie
