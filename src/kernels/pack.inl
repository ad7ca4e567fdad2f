// Packing of GEMM operands: gather, conversion and transposition in one pass. Everything is in 32-bit
// units along K (see kernel_table.h). Three layouts of the source are told apart: K contiguous (weights
// and activations as stored), rows contiguous (transposed views), and the rest, element by element.

// Memory of the source element (row, k) after gathering.
COTERIE_INLINE const char* element(const PackSource& s, int64_t row, int64_t k) {
  const int64_t r = s.gather_rows ? s.gather_rows[row] : row;
  const int64_t c = s.gather_cols ? s.gather_cols[k] : k;
  const int64_t size = s.dtype == DType::kBF16 ? 2 : 4;
  return static_cast<const char*>(s.data) + (r * s.row_stride + c * s.col_stride) * size;
}
COTERIE_INLINE bool rows_contiguous(const PackSource& s) { return s.row_stride == 1 && !s.gather_rows; }
COTERIE_INLINE bool k_contiguous(const PackSource& s) { return s.col_stride == 1 && !s.gather_cols; }

COTERIE_INLINE VU pair_units(VU low, VU high) { return (low >> 16) | (high & 0xffff0000u); }

// The upper half of each lane is the element as bf16 (kPanelBf16; the lower one is undefined), or the lane is the
// element as fp32.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE VU load_elements(const void* p, int64_t n) {
  if (n <= 0) return VU{};
  if constexpr (kSourceBf16) {
    const auto* halves = static_cast<const uint16_t*>(p);
    return (n >= kWidth ? load_halves(halves) : load_halves_part(halves, n)) << 16;
  }
  const auto* floats = static_cast<const float*>(p);
  const VF v = n >= kWidth ? load(floats) : load_part(floats, n);
  if constexpr (kPanelBf16) return round_to_bf16(v);
  return reinterpret_cast<VU>(v);
}

// kWidth units of a row whose next `left` elements lie at p; units past them are zero. K must be contiguous.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE VU units_along_k(const char* p, int64_t left) {
  if (left <= 0) return VU{};
  if constexpr (!kPanelBf16) return load_elements<kSourceBf16, false>(p, left);
  if constexpr (kSourceBf16) {  // pairs lie in memory as the panel wants them
    if (left >= 2 * kWidth) return load_units(p);
    VU v = load_units_part(p, left / 2);
    if (left & 1) v[left / 2] = reinterpret_cast<const uint16_t*>(p)[left - 1];
    return v;
  }
  const VU first = load_elements<false, true>(p, left);
  const VU second = load_elements<false, true>(p + kWidth * sizeof(float), left - kWidth);
  return pair_units(shuffle<EvenLanes>(first, second), shuffle<OddLanes>(first, second));
}

// One unit of n consecutive rows, which lie at `low` and, for the second half of a pair, `high` (null past K).
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE VU units_of_rows(const char* low, const char* high, int64_t n) {
  if constexpr (!kPanelBf16) return load_elements<kSourceBf16, false>(low, n);
  if (kSourceBf16 && high && n >= kWidth) return interleave_halves(low, high);
  const VU first = load_elements<kSourceBf16, true>(low, n);
  return high ? pair_units(first, load_elements<kSourceBf16, true>(high, n)) : first >> 16;
}

// Unit u of n consecutive rows. Rows must be contiguous.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE VU units_along_rows(const PackSource& s, int64_t row, int64_t n, int64_t u) {
  constexpr int64_t kPerUnit = kPanelBf16 ? 2 : 1;
  const bool paired = kPanelBf16 && 2 * u + 1 < s.cols;
  return units_of_rows<kSourceBf16, kPanelBf16>(element(s, row, kPerUnit * u),
                                                paired ? element(s, row, 2 * u + 1) : nullptr, n);
}

// One unit, by any strides.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE uint32_t one_unit(const PackSource& s, int64_t row, int64_t u) {
  if constexpr (!kPanelBf16) return load_elements<kSourceBf16, false>(element(s, row, u), 1)[0];
  const uint32_t low = load_elements<kSourceBf16, true>(element(s, row, 2 * u), 1)[0] >> 16;
  if (2 * u + 1 >= s.cols) return low;
  return low | (load_elements<kSourceBf16, true>(element(s, row, 2 * u + 1), 1)[0] & 0xffff0000u);
}

// How far ahead a source is asked for: along its rows, and in all where it jumps from row to row of memory.
constexpr int64_t kBytesAhead = 512, kBytesAheadAcross = 3072;

// kWidth units of kWidth rows of memory, `count` of them real, whose next `left` elements lie at p and so many bytes
// on; what is not there is zero. K must be contiguous.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE void block_along_k(const char* p, int64_t row_bytes, int64_t count, int64_t left, VU (&block)[kWidth]) {
  constexpr int64_t kWhole = kWidth * (kPanelBf16 ? 2 : 1);
  if (count >= kWidth && left >= kWhole) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      block[i] = units_along_k<kSourceBf16, kPanelBf16>(p, kWhole);
      p += row_bytes;
    }
  } else {
    for (int i = 0; i < kWidth; ++i) {
      block[i] = i < count ? units_along_k<kSourceBf16, kPanelBf16>(p + i * row_bytes, left) : VU{};
    }
  }
}

// The same place of kWidth rows of memory.
COTERIE_INLINE void prefetch_rows(const char* p, int64_t row_bytes) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    __builtin_prefetch(p);
    p += row_bytes;
  }
}

// One vector of columns of B, `count` of them real, with K contiguous: blocks of kWidth^2 are transposed.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE void pack_columns_along_k(const PackSource& s, int64_t units, int64_t first, int64_t count,
                                         uint32_t* half) {
  constexpr int64_t kBytes = kSourceBf16 ? 2 : 4, kPerUnit = kPanelBf16 ? 2 : 1;
  const char* const rows_at = element(s, first, 0);
  const int64_t row_bytes = s.row_stride * kBytes, K_bytes = s.cols * kBytes;
  for (int64_t u = 0; u < units; u += kWidth) {
    const int64_t at = kPerUnit * u * kBytes;
    // What comes kBytesAhead later, in these rows or in those of the next vector.
    const int64_t ahead = at + kBytesAhead, coming = ahead < K_bytes ? ahead : kWidth * row_bytes + ahead - K_bytes;
    VU block[kWidth];
    block_along_k<kSourceBf16, kPanelBf16>(rows_at + at, row_bytes, count, s.cols - kPerUnit * u, block);
    prefetch_rows(rows_at + coming, row_bytes);
    transpose(block);
    const int64_t n = units - u < kWidth ? units - u : kWidth;
    for (int64_t i = 0; i < n; ++i) store_units(half + (u + i) * 2 * kWidth, block[i]);
  }
}

// Panels [first, last) at once, with rows contiguous: a row of memory passes through all of them.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE void pack_panels_along_rows(const PackSource& s, int64_t units, int64_t N, int64_t first, int64_t last,
                                           uint32_t* memory) {
  constexpr int64_t kBytes = kSourceBf16 ? 2 : 4, kPerUnit = kPanelBf16 ? 2 : 1;
  const int64_t first_row = first * 2 * kWidth, end_row = last * 2 * kWidth, panel = whole_chunks(units) * 2 * kWidth;
  const int64_t last_row = end_row < N ? end_row : N, piece = (last_row - first_row) * kBytes;
  const int64_t ahead = kBytesAheadAcross / piece + 1;
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t k = u * kPerUnit + ahead; k < (u + 1) * kPerUnit + ahead && k < s.cols; ++k) {
      const char* const coming = element(s, first_row, k);
      for (int64_t i = 0; i < piece; i += 64) ask_for(coming + i);
    }
    const char* low = element(s, first_row, kPerUnit * u);
    const char* high = kPanelBf16 && 2 * u + 1 < s.cols ? element(s, first_row, 2 * u + 1) : nullptr;
    uint32_t* out = memory + u * 2 * kWidth;
    for (int64_t row = first_row; row < end_row; row += 2 * kWidth, out += panel) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t n = N - row - half * kWidth;
        store_units(out + half * kWidth, units_of_rows<kSourceBf16, kPanelBf16>(low, high, n));
        low += kWidth * kBytes;
        if (high) high += kWidth * kBytes;
      }
    }
  }
}

template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE void pack_columns_one_by_one(const PackSource& s, int64_t units, int64_t first, int64_t count,
                                            uint32_t* half) {
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t i = 0; i < kWidth; ++i) {
      half[u * 2 * kWidth + i] = i < count ? one_unit<kSourceBf16, kPanelBf16>(s, first + i, u) : 0;
    }
  }
}

// The units of panels [first, last) of B that fill up the last chunk.
COTERIE_INLINE void clear_rest(int64_t units, int64_t first, int64_t last, uint32_t* memory) {
  const int64_t padded = whole_chunks(units);
  for (int64_t p = first; p < last; ++p, memory += padded * 2 * kWidth) {
    for (int64_t i = units * 2 * kWidth; i < padded * 2 * kWidth; i += kWidth) store_units(memory + i, VU{});
  }
}

template <bool kSourceBf16, bool kPanelBf16>
void pack_b_as(const PackSource& s, int64_t N, bool gated, int64_t first, int64_t last, uint32_t* memory) {
  const int64_t units = kPanelBf16 ? (s.cols + 1) / 2 : s.cols;
  clear_rest(units, first, last, memory);
  if (!gated && rows_contiguous(s)) {
    return pack_panels_along_rows<kSourceBf16, kPanelBf16>(s, units, N, first, last, memory);
  }
  for (int64_t p = first; p < last; ++p) {
    for (int64_t half = 0; half < 2; ++half) {
      // The second vector of a panel is the next columns, or the up rows of the same columns.
      const int64_t column = gated ? p * kWidth : (2 * p + half) * kWidth, row = gated ? half * N + column : column;
      const int64_t count = N - column;
      uint32_t* const out = memory + (p - first) * whole_chunks(units) * 2 * kWidth + half * kWidth;
      if (k_contiguous(s)) {
        pack_columns_along_k<kSourceBf16, kPanelBf16>(s, units, row, count, out);
      } else {
        pack_columns_one_by_one<kSourceBf16, kPanelBf16>(s, units, row, count, out);
      }
    }
  }
}

// kWidth units of kWidth consecutive rows, of which `count` are there, units past K being zero. Rows must be
// contiguous.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE void block_along_rows(const PackSource& s, int64_t row, int64_t count, int64_t u, VU (&rows)[kWidth]) {
  constexpr int64_t kPerUnit = kPanelBf16 ? 2 : 1;
  const int64_t left = s.cols - kPerUnit * u;
  if (count >= kWidth && left >= kPerUnit * kWidth && !s.gather_cols) {
    const int64_t line = s.col_stride * (kSourceBf16 ? 2 : 4);
    const char* source = element(s, row, kPerUnit * u);
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j, source += kPerUnit * line) {
      rows[j] = units_of_rows<kSourceBf16, kPanelBf16>(source, source + line, kWidth);
    }
  } else {
    for (int64_t j = 0; j < kWidth; ++j) {
      const bool inside = kPerUnit * j < left;
      rows[j] = inside ? units_along_rows<kSourceBf16, kPanelBf16>(s, row, count, u + j) : VU{};
    }
  }
}

// A's panels with rows contiguous, kWidth units at a time through all panels.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE void pack_a_along_rows(const PackSource& s, int64_t units, const RowPanels& panels, int64_t first,
                                      int64_t last, uint32_t* memory) {
  const int64_t first_row = panels.first_row(first), end_row = panels.first_row(last);
  for (int64_t u = 0; u < units; u += kWidth) {
    int64_t p = first, in_panel = 0;
    int count = panels.rows(p);
    uint32_t* panel = memory;
    uint32_t* line = panel + u / kChunkUnits * count * kChunkUnits + u % kChunkUnits;
    for (int64_t row = first_row; row < end_row; row += kWidth) {
      VU rows[kWidth];
      block_along_rows<kSourceBf16, kPanelBf16>(s, row, panels.M - row, u, rows);
      transpose(rows);
      for (int i = 0; i < kWidth && row + i < end_row; ++i, line += kChunkUnits) {
        if (in_panel == count) {
          panel += count * whole_chunks(units);
          count = panels.rows(++p);
          in_panel = 0;
          line = panel + u / kChunkUnits * count * kChunkUnits + u % kChunkUnits;
        }
        store_units(line, rows[i]);
        ++in_panel;
      }
    }
  }
}

template <bool kSourceBf16, bool kPanelBf16>
void pack_a_as(const PackSource& s, const RowPanels& panels, int64_t first, int64_t last, uint32_t* memory) {
  const int64_t units = kPanelBf16 ? (s.cols + 1) / 2 : s.cols;
  if (!k_contiguous(s) && rows_contiguous(s)) {
    return pack_a_along_rows<kSourceBf16, kPanelBf16>(s, units, panels, first, last, memory);
  }
  uint32_t* panel = memory;
  for (int64_t p = first; p < last; ++p) {
    const int count = panels.rows(p);
    for (int i = 0; i < count; ++i) {
      const int64_t row = panels.first_row(p) + i;
      uint32_t* const lines = panel + i * kChunkUnits;
      if (k_contiguous(s)) {
        constexpr int64_t kBytes = kSourceBf16 ? 2 : 4, kPerUnit = kPanelBf16 ? 2 : 1;
        const char* const source = element(s, row, 0);
        for (int64_t u = 0; u < units; u += kWidth) {
          const int64_t k = kPerUnit * u;
          const VU v = units_along_k<kSourceBf16, kPanelBf16>(source + k * kBytes, s.cols - k);
          store_units(lines + u / kChunkUnits * count * kChunkUnits + u % kChunkUnits, v);
        }
      } else {
        for (int64_t u = 0; u < whole_chunks(units); ++u) {
          lines[u / kChunkUnits * count * kChunkUnits + u % kChunkUnits] =
              u < units ? one_unit<kSourceBf16, kPanelBf16>(s, row, u) : 0;
        }
      }
    }
    panel += count * whole_chunks(units);
  }
}

void pack_b(const PackSource& source, PanelType type, int64_t N, bool gated, int64_t first, int64_t last,
            uint32_t* memory) {
  const bool from_bf16 = source.dtype == DType::kBF16, to_bf16 = type == PanelType::kBF16;
  if (from_bf16 && to_bf16) return pack_b_as<true, true>(source, N, gated, first, last, memory);
  if (from_bf16) return pack_b_as<true, false>(source, N, gated, first, last, memory);
  if (to_bf16) return pack_b_as<false, true>(source, N, gated, first, last, memory);
  pack_b_as<false, false>(source, N, gated, first, last, memory);
}

void pack_float_a(const PackSource& source, PanelType type, const RowPanels& panels, int64_t first, int64_t last,
                  uint32_t* memory) {
  const bool from_bf16 = source.dtype == DType::kBF16, to_bf16 = type == PanelType::kBF16;
  const bool pairs = to_bf16 && kMultipliesBf16;
  if (from_bf16 && pairs) return pack_a_as<true, true>(source, panels, first, last, memory);
  if (from_bf16) return pack_a_as<true, false>(source, panels, first, last, memory);
  if (pairs) return pack_a_as<false, true>(source, panels, first, last, memory);
  pack_a_as<false, false>(source, panels, first, last, memory);
  if (!to_bf16) return;
  // Widened, and rounded.
  const int64_t units = (panels.first_row(last) - panels.first_row(first)) * whole_chunks(source.cols);
  for (int64_t i = 0; i < units; i += kWidth) {
    store_units(memory + i, round_to_bf16(load(reinterpret_cast<const float*>(memory + i))) & 0xffff0000u);
  }
}
