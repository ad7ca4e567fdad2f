// Products of few rows of A, for which packing B would cost more than multiplying: B is read once, where it lies.
// Every sum is the same chain over K as in multiply.inl: the same bits.
//
// With K contiguous (weights as stored) blocks of B are transposed in registers, and units of a panel of A are
// broadcast to them. With more rows than a few it is C^T = B * A^T: an element of B at a time is broadcast to a vector
// of rows of A, which lies in strips; at the end the sums are turned around into a tile as multiply makes it. With
// columns contiguous (weights transposed) B is a panel as it lies, but for pairs in bf16.

template <bool kSourceBf16, bool kPanelBf16>
void pack_strips_as(const PackSource& s, int64_t M, int64_t first, int64_t last, uint32_t* memory) {
  const int64_t units = kPanelBf16 ? (s.cols + 1) / 2 : s.cols, padded = whole_chunks(units);
  constexpr int64_t kPerUnit = kPanelBf16 ? 2 : 1;
  const bool along_k = k_contiguous(s);
  for (int64_t row = first * kWidth; row < last * kWidth; row += kWidth) {
    for (int64_t u = 0; u < padded; u += kWidth, memory += kWidth * kWidth) {
      VU rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        if (row + i >= M) {
          rows[i] = VU{};
        } else if (along_k) {
          rows[i] = units_along_k<kSourceBf16, kPanelBf16>(element(s, row + i, kPerUnit * u), s.cols - kPerUnit * u);
        } else {
          for (int j = 0; j < kWidth; ++j) {
            rows[i][j] = u + j < units ? one_unit<kSourceBf16, kPanelBf16>(s, row + i, u + j) : 0;
          }
        }
      }
      transpose(rows);
      for (int j = 0; j < kWidth; ++j) store_units(memory + j * kWidth, rows[j]);
    }
  }
}

void pack_strips(const PackSource& source, PanelType type, int64_t M, int64_t first, int64_t last, uint32_t* memory) {
  const bool from_bf16 = source.dtype == DType::kBF16, to_bf16 = type == PanelType::kBF16;
  if (from_bf16 && to_bf16) return pack_strips_as<true, true>(source, M, first, last, memory);
  if (from_bf16) return pack_strips_as<true, false>(source, M, first, last, memory);
  if (to_bf16) return pack_strips_as<false, true>(source, M, first, last, memory);
  pack_strips_as<false, false>(source, M, first, last, memory);
}

// Rows of the stored B, columns of C, that are multiplied at once: enough independent sums to hide the latency, few
// enough for the registers (and for the ways of an L1 cache, where rows lie a multiple of 4 KiB apart).
constexpr int rows_at_once(int strips) {
  const int sums = kVectorBytes == 64 ? 16 : 8, rows = sums / strips < 8 ? sums / strips : 8;
  return rows < kWidth ? rows : kWidth;
}

// One step of K: the same unit of all rows of B times a row of each strip.
template <bool kBf16, int kRows, int kStrips>
COTERIE_INLINE void multiply_unit(const uint32_t (&unit)[kRows], const uint32_t* strips, int64_t strip_units,
                                  VF (&sums)[kRows][kStrips]) {
  VU a[kStrips];
#pragma GCC unroll 2
  for (int s = 0; s < kStrips; ++s) a[s] = load_units(strips + s * strip_units);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s) sums[i][s] = multiply_add<kBf16>(unit[i], a[s], sums[i][s]);
  }
}

COTERIE_INLINE uint32_t load_unit(const char* p) {
  uint32_t unit;
  __builtin_memcpy(&unit, p, sizeof(unit));
  return unit;
}
COTERIE_INLINE uint32_t load_half_unit(const char* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, sizeof(half));
  return half;
}

// sums[strip][column of C][row of A] of kRows columns of C, of which `count` are there.
template <bool kBf16, int kRows, int kStrips>
COTERIE_INLINE void multiply_rows(const PanelInPlace& b, const char* first, int64_t count, int64_t units,
                                  const uint32_t* strips, float* out) {
  const char* row[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) row[i] = first + (i < count ? i : count - 1) * b.stride_bytes;
  const int64_t strip_units = whole_chunks(units) * kWidth;
  const int64_t whole = kBf16 ? b.cols / 2 : b.cols;  // the last unit of an odd K is half a unit
  VF sums[kRows][kStrips] = {};
  int64_t u = 0;
  for (; u + kChunkUnits <= whole; u += kChunkUnits, strips += kChunkUnits * kWidth) {
    const int64_t ahead = b.byte_ahead(4 * whole, 4 * u);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(row[i] + ahead, 0, 2);
#pragma GCC unroll 16
    for (int64_t j = 0; j < kChunkUnits; ++j) {
      uint32_t unit[kRows];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) unit[i] = load_unit(row[i] + 4 * (u + j));
      multiply_unit<kBf16>(unit, strips + j * kWidth, strip_units, sums);
    }
  }
  for (; u < units; ++u, strips += kWidth) {
    uint32_t unit[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) unit[i] = u < whole ? load_unit(row[i] + 4 * u) : load_half_unit(row[i] + 4 * u);
    multiply_unit<kBf16>(unit, strips, strip_units, sums);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s) store(out + (s * kWidth + i) * kWidth, sums[i][s]);
  }
}

template <bool kBf16, int kStrips>
void multiply_broadcast(const PanelInPlace& b, int64_t units, const uint32_t* strips, float* tile) {
  constexpr int kRows = rows_at_once(kStrips);
  alignas(64) float sums[kStrips * kWidth * kWidth];  // [strip][column of C][row of A]
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < b.count[half]; i += kRows) {
      const char* const first = static_cast<const char*>(b.start[half]) + i * b.stride_bytes;
      multiply_rows<kBf16, kRows, kStrips>(b, first, b.count[half] - i, units, strips, sums + i * kWidth);
    }
    for (int s = 0; s < kStrips; ++s) {
      turn_sums(sums + s * kWidth * kWidth, tile + s * kWidth * 2 * kWidth + half * kWidth);
    }
  }
}

template <bool kBf16>
void multiply_along_k(const PanelInPlace& b, int64_t units, const uint32_t* strips, int64_t rows, float* tile) {
  if (rows <= kWidth) return multiply_broadcast<kBf16, 1>(b, units, strips, tile);
  multiply_broadcast<kBf16, 2>(b, units, strips, tile);
}

// What a block asks for, line by line: from memory into L2, and from there what comes soon.
struct Coming {
  const char* far;
  int64_t far_step;
  const char* near;
  int64_t near_step;

  COTERIE_INLINE void ask_behind_both(VF& first, VF& second) {
    ask_into_L2_behind(first, far);
    ask_behind(second, near);
    far += far_step;
    near += near_step;
  }
};

// `left` units of kWidth columns, block[unit], times what meets them in a panel of A.
template <bool kBf16, int kRows>
COTERIE_INLINE void multiply_block(const uint32_t* a, const VU (&block)[kWidth], int64_t left, Coming coming,
                                   VF (&sums)[kRows]) {
#pragma GCC unroll 16
  for (int j = 0; j < kWidth; ++j) {
    if (j >= left) return;
    const uint32_t* const beside = beside_unit<kBf16, kRows>(a, j);
#pragma GCC unroll 2
    for (int s = 0; s < kSteps<kBf16>; ++s) {
      const VU b = in_step<kBf16>(s, block[j]);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) sums[i] = multiply_add<kBf16>(beside[i * kChunkUnits + s], b, sums[i]);
    }
    coming.ask_behind_both(sums[0], sums[kRows - 1]);
  }
}

// A vector of columns of C. While one is multiplied, the same one of the next panel is asked for, in the order of
// memory where that has no gaps.
template <bool kBf16, int kRows>
COTERIE_INLINE void multiply_few_by(const PanelInPlace& b, int half, int64_t units, const uint32_t* a, float* tile) {
  constexpr int64_t kBytesFromL2 = 256;  // asked for so many bytes before their turn
  const char* const first = static_cast<const char*>(b.start[half]);
  const int64_t column_bytes = b.cols * (kBf16 ? 2 : 4), stride = b.stride_bytes;
  VF sums[kRows] = {};
  for (int64_t u = 0; u < units; u += kWidth) {
    const char* const at = first + 4 * u;
    const int64_t left = units - u;
    VU block[kWidth];
    block_along_k<kBf16, kBf16>(at, stride, b.count[half], b.cols - (kBf16 ? 2 : 1) * u, block);
    Coming coming = {first + b.byte_ahead(column_bytes, 4 * u), stride, at + kBytesFromL2, stride};
    if (stride == column_bytes) {
      coming.far = first + b.columns_ahead * stride + 4 * u * kWidth;
      coming.far_step = kVectorBytes;
    }
    transpose(block);
    const uint32_t* const unit = beside_unit<kBf16, kRows>(a, u);
    if (left >= kWidth) {
      multiply_block<kBf16, kRows>(unit, block, kWidth, coming, sums);
    } else {
      multiply_block<kBf16, kRows>(unit, block, left, coming, sums);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) store(tile + i * 2 * kWidth + half * kWidth, sums[i]);
}

template <bool kBf16, int kRows>
void multiply_few(const PanelInPlace& b, int64_t units, const uint32_t* a, float* tile) {
  for (int half = 0; half < 2; ++half) {
    if (b.count[half] > 0) multiply_few_by<kBf16, kRows>(b, half, units, a, tile);
  }
}

// Their sums and a block are in registers at once; of more rows most lanes of a strip are used.
constexpr int kFewRows = kVectorBytes == 64 ? 12 : kWidth / 2;
static_assert(kFewRows <= kPanelRowsF32 && kFewRows <= kPanelRowsBf16, "they are one panel of A");
template <bool kBf16, int... kIndex>
constexpr void fill_few(KernelTable& table, std::integer_sequence<int, kIndex...>) {
  table.few_rows[kBf16] = kFewRows;
  ((table.multiply_few[kBf16][kIndex] = multiply_few<kBf16, kIndex + 1>), ...);
}

// Unit u of the columns from `column` on: elements of K lie stride_bytes apart. `whole`: all of the unit is there.
template <bool kBf16>
COTERIE_INLINE VU units_along_n(const char* column, int64_t stride_bytes, int64_t u, bool whole) {
  if constexpr (!kBf16) return load_units(column + u * stride_bytes);
  const auto* low = reinterpret_cast<const uint16_t*>(column + 2 * u * stride_bytes);
  if (!whole) return load_halves(low);
  return load_halves(low) | load_halves(reinterpret_cast<const uint16_t*>(column + (2 * u + 1) * stride_bytes)) << 16;
}

template <bool kBf16, int kRows>
void multiply_along_n(const PanelInPlace& b, int64_t units, const uint32_t* a, uint32_t* packed, float* tile) {
  constexpr int64_t kPerUnit = kBf16 ? 2 : 1;
  const auto *first = static_cast<const char*>(b.start[0]), *second = static_cast<const char*>(b.start[1]);
  const int64_t stride = b.stride_bytes, whole = b.cols / kPerUnit;
  VF sums[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sums[i][0] = load(tile + i * 2 * kWidth);
    sums[i][1] = load(tile + i * 2 * kWidth + kWidth);
  }
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t k = kPerUnit * (u + kPartUnits); k < kPerUnit * (u + kPartUnits + 1); ++k) {
      __builtin_prefetch(first + k * stride, 0, 2);
      __builtin_prefetch(second + k * stride, 0, 2);
    }
    const VU b0 = units_along_n<kBf16>(first, stride, u, u < whole);
    const VU b1 = units_along_n<kBf16>(second, stride, u, u < whole);
    if (packed) {
      store_units(packed + u * 2 * kWidth, b0);
      store_units(packed + u * 2 * kWidth + kWidth, b1);
    }
    multiply_unit<kBf16>(beside_unit<kBf16, kRows>(a, u), b0, b1, sums);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(tile + i * 2 * kWidth, sums[i][0]);
    store(tile + i * 2 * kWidth + kWidth, sums[i][1]);
  }
}

template <bool kBf16, int... kIndex>
constexpr void fill_along_n(void (*(&functions)[kMaxPanelRows])(const PanelInPlace&, int64_t, const uint32_t*,
                                                                uint32_t*, float*),
                            std::integer_sequence<int, kIndex...>) {
  ((functions[kIndex] = multiply_along_n<kBf16, kIndex + 1>), ...);
}
