// A row of a packed matrix, element by element as panels.h says that they lie.
#include <algorithm>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/packed_matrix.h"

namespace coterie {
namespace {

// A column of a panel of B, which is a row of B.
struct PanelColumn {
  const uint32_t* panel;
  int64_t columns, column;  // of the panel, and which one
  int64_t K;

  uint32_t unit(const uint32_t* rows, int64_t u) const { return rows[u * columns + column]; }
};

float from_high_half(uint32_t bits) { return __builtin_bit_cast(float, bits & 0xffff0000u); }
template <typename T>
T read_at(const void* memory, int64_t index) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(memory) + index * static_cast<int64_t>(sizeof(T)), sizeof value);
  return value;
}

void read_fp32(const PanelColumn& c, float* out_K) {
  for (int64_t k = 0; k < c.K; ++k) out_K[k] = __builtin_bit_cast(float, c.unit(c.panel, k));
}

void read_bf16(const PanelColumn& c, float* out_K) {
  for (int64_t k = 0; k < c.K; ++k) out_K[k] = from_high_half(c.unit(c.panel, k / 2) << (k % 2 == 0 ? 16 : 0));
}

void read_compact(const PanelColumn& c, float* out_K) {
  const CompactPanel shape = {c.K, c.columns};
  const int64_t bytes = 2 * c.columns;  // of a unit, from each of its places
  const auto byte_at = [&](int64_t place) {
    const int64_t in_vector = place % c.columns;
    return in_vector / 8 * 16 + place / c.columns * 8 + in_vector % 8;
  };
  const int64_t byte_of_half[2] = {byte_at(2 * c.column), byte_at(2 * c.column + 1)};
  for (int64_t k = 0; k < c.K; ++k) {
    const int64_t u = k / 2, byte = byte_of_half[k % 2];
    const uint32_t* const pair = c.panel + shape.codes() + u / 2 * 2 * shape.codes_of_unit();
    const uint32_t code = read_at<uint8_t>(pair, 2 * bytes + byte) >> u % 2 * 4 & 15;
    const uint32_t exponent = read_at<uint8_t>(c.panel, byte) + code % 8;
    const uint32_t low = read_at<uint8_t>(pair, u % 2 * bytes + byte);
    out_K[k] = from_high_half(code / 8 << 31 | exponent << 24 | low << 16);
  }
  for (int64_t chunk = 0; chunk < shape.chunks(); ++chunk) {
    const uint32_t* const begins = c.panel + shape.begins();
    for (int64_t i = read_at<uint16_t>(begins, chunk); i < read_at<uint16_t>(begins, chunk + 1); ++i) {
      const uint32_t patch = c.panel[shape.patches() + i];
      const int64_t place = patch & 0xffffu, u = place / bytes, in_unit = place % bytes;
      if (in_unit / 2 != c.column) continue;
      out_K[2 * (chunk * kChunkUnits + u) + in_unit % 2] = from_high_half(patch);
    }
  }
}

void read_quantized(const PanelColumn& c, PanelType type, float* out_K) {
  const QuantizedFormat format = quantized_format(type);
  // Of the panel's rows, the one with element k: four or eight in each column.
  const auto row_of = [&](int64_t k) { return format.bits == 8 ? k / 4 : k / 8; };
  const int64_t rows = units_of(type, c.K) * format.bits / 8;
  const uint32_t* group = c.panel;
  for (int64_t first = 0; first < c.K; first += format.group) {
    const uint32_t* const scales = group + std::min(row_of(format.group), rows - row_of(first)) * c.columns;
    for (int64_t k = first; k < std::min(c.K, first + format.group); ++k) {
      const uint32_t byte = c.unit(group, row_of(k - first)) >> k % 4 * 8 & 0xffu;
      int code = static_cast<int>(format.bits == 8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4);
      if (type == PanelType::kMxfp4) code = mxfp4_doubled(code);
      out_K[k] = format.stored_minimum
                     ? static_cast<float>(read_at<uint8_t>(scales, c.column) * code +
                                          kMinimumUnit * read_at<int8_t>(scales, c.columns + c.column))
                     : to_float(read_at<BFloat16>(scales, c.column)) * static_cast<float>(code - format.offset);
    }
    group = scales + c.columns / 2;
  }
  if (!format.stored_minimum) return;
  const float factor = read_at<float>(group, c.column);
  for (int64_t k = 0; k < c.K; ++k) out_K[k] *= factor;
}

}  // namespace

void PackedMatrix::read_row(int64_t n, float* out_K) const {
  COTERIE_CHECK(!gated() && n >= 0 && n < rows(), "no row of a matrix that is not gated");
  const int64_t columns = kernels_->panel_columns();
  const auto* const panel = panels_.as<uint32_t>() + n / columns * shape_.panel_units(columns);
  const PanelColumn column = {panel, columns, n % columns, cols()};
  if (is_quantized(type())) return read_quantized(column, type(), out_K);
  if (shape_.compact) return read_compact(column, out_K);
  return type() == PanelType::kBF16 ? read_bf16(column, out_K) : read_fp32(column, out_K);
}

}  // namespace coterie
