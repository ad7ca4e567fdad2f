#include "kernels/quantized.h"

#include "base/check.h"
#include "kernels/kernel_table.h"

namespace coterie {
namespace {

int code_at(const uint32_t* words, int bits, int64_t k) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(words);
  if (bits == 8) return bytes[k];
  const int shared = bytes[k / 8 * 4 + k % 4];
  return k % 8 < 4 ? shared & 15 : shared >> 4;
}

}  // namespace

QuantizedView QuantizedView::row_range(int64_t first, int64_t count) const {
  QuantizedView part = *this;
  part.rows = count;
  part.codes += first * row_words();
  part.scales += first * groups();
  if (minimums) part.minimums += first * groups();
  return part;
}

float QuantizedView::element(int64_t row, int64_t col) const {
  const QuantizedFormat format = quantized_format(type);
  const int64_t g = row * groups() + col / format.group;
  int code = code_at(codes + row * row_words(), format.bits, col);
  if (type == PanelType::kMxfp4) code = mxfp4_doubled(code);
  const float scale = to_float(scales[g]);
  return format.stored_minimum ? scale * static_cast<float>(code) + to_float(minimums[g])
                               : scale * static_cast<float>(code - format.offset);
}

QuantizedMatrix::QuantizedMatrix(PanelType type, int64_t rows, int64_t cols)
    : type_(type),
      rows_(rows),
      cols_(cols),
      codes_(static_cast<size_t>(rows * QuantizedView::quantized_row_words(type, cols))),
      scales_(static_cast<size_t>(rows * groups_of(type, cols))),
      minimums_(quantized_format(type).stored_minimum ? scales_.size() : 0) {}

QuantizedMatrix::QuantizedMatrix(const ConstMatrix& b, PanelType type, ThreadPool& pool)
    : QuantizedMatrix(type, b.rows, b.cols) {
  COTERIE_CHECK(b.col_stride == 1, "weights to quantize have contiguous rows");
  COTERIE_CHECK(is_quantized(type) && type != PanelType::kMxfp4, "not a type that weights are rounded to");
  const int64_t words = view().row_words(), groups = view().groups();
  pool.run(rows_, [&](int64_t row, int) {
    BFloat16* const minimums = minimums_.empty() ? nullptr : minimums_.data() + row * groups;
    active_kernels().quantize_weights_row(b.row_range(row, 1).data, b.dtype, cols_, type_, codes_.data() + row * words,
                                          scales_.data() + row * groups, minimums);
  });
}

QuantizedView QuantizedMatrix::view() const {
  return {type_, rows_, cols_, codes_.data(), scales_.data(), minimums_.empty() ? nullptr : minimums_.data()};
}

}  // namespace coterie
