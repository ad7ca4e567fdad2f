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
  if (scales) part.scales += first * groups();
  if (scale_codes) part.scale_codes += first * groups();
  if (minimum_codes) part.minimum_codes += first * groups();
  if (row_factors) part.row_factors += first;
  return part;
}

float QuantizedView::scale(int64_t row, int64_t group) const {
  const int64_t g = row * groups() + group;
  return row_factors ? row_factors[row] * static_cast<float>(scale_codes[g]) : to_float(scales[g]);
}

float QuantizedView::minimum(int64_t row, int64_t group) const {
  if (!row_factors) return scale(row, group) * static_cast<float>(-quantized_format(type).offset);
  return row_factors[row] * static_cast<float>(kMinimumUnit * minimum_codes[row * groups() + group]);
}

float QuantizedView::element(int64_t row, int64_t col) const {
  const QuantizedFormat format = quantized_format(type);
  const int64_t g = row * groups() + col / format.group;
  int code = code_at(codes + row * row_words(), format.bits, col);
  if (type == PanelType::kMxfp4) code = mxfp4_doubled(code);
  if (!format.stored_minimum) return to_float(scales[g]) * static_cast<float>(code - format.offset);
  return row_factors[row] * static_cast<float>(scale_codes[g] * code + kMinimumUnit * minimum_codes[g]);
}

QuantizedMatrix::QuantizedMatrix(PanelType type, int64_t rows, int64_t cols)
    : type_(type),
      rows_(rows),
      cols_(cols),
      codes_(static_cast<size_t>(rows * QuantizedView::quantized_row_words(type, cols))) {
  const auto groups = static_cast<size_t>(rows * groups_of(type, cols));
  if (quantized_format(type).stored_minimum) {
    scale_codes_.resize(groups);
    minimum_codes_.resize(groups);
    row_factors_.resize(static_cast<size_t>(rows));
  } else {
    scales_.resize(groups);
  }
}

QuantizedMatrix::QuantizedMatrix(const ConstMatrix& b, PanelType type, ThreadPool& pool)
    : QuantizedMatrix(type, b.rows, b.cols) {
  COTERIE_CHECK(b.col_stride == 1, "weights to quantize have contiguous rows");
  COTERIE_CHECK(is_quantized(type) && type != PanelType::kMxfp4, "not a type that weights are rounded to");
  const int64_t words = view().row_words(), groups = view().groups();
  const bool coded = quantized_format(type).stored_minimum;
  pool.run(rows_, [&](int64_t row, int) {
    QuantizedRow out = {.codes = codes_.data() + row * words};
    std::vector<float> workspace(coded ? 2 * groups : 0);
    if (coded) {
      out.scale_codes = scale_codes_.data() + row * groups;
      out.minimum_codes = minimum_codes_.data() + row * groups;
      out.factor = &row_factors_[row];
      out.workspace = workspace.data();
    } else {
      out.scales = scales_.data() + row * groups;
    }
    active_kernels().quantize_weights_row(b.row_range(row, 1).data, b.dtype, cols_, type_, out);
  });
}

QuantizedView QuantizedMatrix::view() const {
  const bool coded = quantized_format(type_).stored_minimum;
  return {.type = type_,
          .rows = rows_,
          .cols = cols_,
          .codes = codes_.data(),
          .scales = coded ? nullptr : scales_.data(),
          .scale_codes = coded ? scale_codes_.data() : nullptr,
          .minimum_codes = coded ? minimum_codes_.data() : nullptr,
          .row_factors = coded ? row_factors_.data() : nullptr};
}

}  // namespace coterie
