// How the operands of a product lie in memory for the micro-kernels: what panels are made of, and their sizes.
//
// Operands are packed as 32-bit units along K: one float, two bf16 (k even in the low half), or four codes of 8 bits.
// A chunk is 16 units (one cache line) of a row of A; a panel of A with m rows is [chunks][m][16]. A panel of B is
// [units][2 * width]: 2 vectors of columns side by side, zero up to a whole chunk; a row of A is zero up to a whole
// vector at least.
//
// Quantized types. K is cut into groups (the last may be shorter). Of B, an element is scale * code + minimum with
// unsigned codes, and a scale per group and column. The minimum is -offset * scale, with scales in bf16; or it is
// stored, and then scale and minimum are multiples of a factor of the column, s and kMinimumUnit * m times it, with s
// of 8 bits unsigned and m of 8 bits signed. Of A, an element is scale * code with codes in [-127, 127] and a scale in
// fp32 per group and row: what is in A is rounded anew in every product. (Of codes of 16 bits, 256 h + l, a panel has
// the rows of h first, then those of l: twice as many.) Codes are multiplied and summed up in integers, exactly; groups
// are summed up in fp32, in order. A panel of A is followed by [groups][m] of Factors. A panel of B is group by group:
// the codes, [units][2 * width], or [pairs of units][2 * width] where the codes of 4 bits of two units share their
// bytes (the first has the low halves), then the scales, [2 * width], of 16 bits, or of 8 with as many minimums behind
// them; last the columns' factors in fp32 where there are any.
//
// Compact panels. Weights in bf16 that are only read, never changed, need not take 16 bits an element: the exponents of
// a column's weights are few. The low byte of an element is kept, and the high one, the sign and seven bits of the
// exponent, becomes a code of 4 bits: the sign above three bits that count from a base, which every place in a row of
// the panel has its own of. The few elements that are too small for that are listed, as patches: their places and the
// elements themselves. Nothing is lost. Where there are more of them than the list has room for, the panel stays as it
// is.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace coterie {

enum class PanelType : uint8_t { kF32, kBF16, kInt8, kInt8A16, kInt4, kInt4Group64, kMxfp4 };
inline constexpr int kPanelTypes = 7, kFirstQuantized = 2;

constexpr bool is_quantized(PanelType type) { return static_cast<int>(type) >= kFirstQuantized; }
constexpr int index_of(PanelType type) { return static_cast<int>(type); }
constexpr PanelType panel_type(DType dtype) { return dtype == DType::kBF16 ? PanelType::kBF16 : PanelType::kF32; }

struct QuantizedFormat {
  int64_t group = 0;            // elements along K
  int bits = 0;                 // of a code of B
  int offset = 0;               // the minimum is -offset * scale
  bool stored_minimum = false;  // with scales of 8 bits
  int parts = 1;                // bytes of a code of A

  constexpr int64_t group_units() const { return group / 4; }
};
// kInt8: symmetric. kInt8A16: the same with codes of 16 bits for A, in [-32512, 32512], for products of few rows whose
// result is sensitive: the head's. kInt4: 4.5 bits an element with all that belongs to it; kInt4Group64: 4.25. kMxfp4:
// E2M1 numbers with a power of two per 32, the format of the Open Compute Project (Microscaling Formats 1.0); a code
// stands for mxfp4_doubled(code), which is 12 + twice the number, and the scale is half the file's.
constexpr QuantizedFormat quantized_format(PanelType type) {
  switch (type) {
    case PanelType::kInt8:
      return {.group = 64, .bits = 8, .offset = 128};
    case PanelType::kInt8A16:
      return {.group = 64, .bits = 8, .offset = 128, .parts = 2};
    case PanelType::kInt4Group64:
      return {.group = 64, .bits = 4, .stored_minimum = true};
    case PanelType::kInt4:
      return {.group = 32, .bits = 4, .stored_minimum = true};
    case PanelType::kMxfp4:
      return {.group = 32, .bits = 4, .offset = 12};
    default:
      return {};
  }
}
constexpr int kMinimumUnit = 16;
constexpr int mxfp4_doubled(int code) {
  constexpr int kMagnitude[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  return 12 + (code & 8 ? -1 : 1) * kMagnitude[code & 7];
}

// Of one row of a panel of A and one group.
struct Factors {
  float scale = 0.0f;
  // What the minimums of B add: the sum of the codes, as an integer times -offset, or where minimums are stored as a
  // float times scale and kMinimumUnit.
  uint32_t sum = 0;
};

inline constexpr int64_t kChunkUnits = 16;
inline constexpr int kMaxPanelRows = 32;
inline constexpr int64_t kMaxPanelColumns = 32;
// multiply may read this far behind the last panel of A.
inline constexpr int64_t kBehindPanelsA = 15 * kChunkUnits;

// Elements along K.
constexpr int64_t elements_of_unit(PanelType type) { return is_quantized(type) ? 4 : type == PanelType::kBF16 ? 2 : 1; }
constexpr int64_t whole_chunks(int64_t units) { return (units + kChunkUnits - 1) / kChunkUnits * kChunkUnits; }
// Quantized ones come in pairs.
constexpr int64_t units_of(PanelType type, int64_t K) {
  if (is_quantized(type)) return (K + 7) / 8 * 2;
  return type == PanelType::kBF16 ? (K + 1) / 2 : K;
}
constexpr int64_t groups_of(PanelType type, int64_t K) {
  return (K + quantized_format(type).group - 1) / quantized_format(type).group;
}

// Units of memory of a row of A of this type, and of a panel of B with `columns` columns. What a row of A takes in a
// product says KernelTable::a_row_units: it may be widened.
constexpr int64_t a_row_units(PanelType type, int64_t K) {
  const int64_t codes = whole_chunks(units_of(type, K));
  constexpr int64_t kFactors = sizeof(Factors) / sizeof(uint32_t);
  if (!is_quantized(type)) return codes;
  return whole_chunks(quantized_format(type).parts * codes + kFactors * groups_of(type, K));
}
constexpr int64_t b_panel_units(PanelType type, int64_t K, int64_t columns) {
  if (!is_quantized(type)) return whole_chunks(units_of(type, K)) * columns;
  const QuantizedFormat format = quantized_format(type);
  const int64_t factors = format.stored_minimum ? columns : 0;
  return (units_of(type, K) * format.bits / 8 * columns) + groups_of(type, K) * columns / 2 + factors;
}

// A compact panel: the bases, a byte for each element of a row of the plain panel; where each chunk's patches begin, in
// 16 bits, and where the last ones end; the patches, the place in the chunk below and the element above; then pairs of
// units: the first one's low bytes, the second's, and the codes of both, which share their bytes (the first has the low
// halves). Bytes lie in the order in which vectors are split into them: 16 bytes are 8 elements of the first vector and
// 8 of the second. Elements past K are any finite numbers.
struct CompactPanel {
  int64_t K = 0;
  int64_t columns = 0;  // of the panel

  constexpr int64_t units() const { return whole_chunks(units_of(PanelType::kBF16, K)); }
  constexpr int64_t chunks() const { return units() / kChunkUnits; }
  constexpr int64_t most_patches() const { return 2 * chunks() + 16; }
  // In 32-bit units from the panel's start.
  constexpr int64_t begins() const { return columns / 2; }
  constexpr int64_t patches() const { return begins() + (chunks() + 2) / 2; }
  constexpr int64_t codes() const { return whole_chunks(patches() + most_patches()); }
  constexpr int64_t codes_of_unit() const { return columns * 3 / 4; }  // of each, in an even number of them
  constexpr int64_t size() const { return whole_chunks(codes() + units() * codes_of_unit()); }
};

// How the M rows of A are spread over P panels: evenly, 13 rows are 7 + 6 rather than 12 + 1. The panels of
// a matrix lie one behind the other.
struct RowPanels {
  int64_t M = 0, P = 0;

  int64_t first_row(int64_t p) const { return p * (M / P) + (p < M % P ? p : M % P); }
  int rows(int64_t p) const { return static_cast<int>(M / P + (p < M % P)); }
};

// Of panels with at most `most` rows, as few of them as that takes, one of so few is the only one: panels of B that it
// meets are read once.
constexpr bool is_only_panel(int rows, int most) { return rows < (most + 1) / 2; }

}  // namespace coterie
