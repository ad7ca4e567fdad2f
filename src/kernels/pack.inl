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

// The upper half of each lane is the element as bf16 (kPanelBf16), or the lane is the element as fp32.
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

// kWidth units of one row from unit u on; units past K are zero. K must be contiguous.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE VU units_along_k(const PackSource& s, int64_t row, int64_t u) {
  const int64_t k = kPanelBf16 ? 2 * u : u, left = s.cols - k;
  if (left <= 0) return VU{};
  const char* p = element(s, row, k);
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

// Unit u of n consecutive rows. Rows must be contiguous.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE VU units_along_rows(const PackSource& s, int64_t row, int64_t n, int64_t u) {
  if constexpr (!kPanelBf16) return load_elements<kSourceBf16, false>(element(s, row, u), n);
  const VU low = load_elements<kSourceBf16, true>(element(s, row, 2 * u), n);
  if (2 * u + 1 >= s.cols) return low >> 16;
  return pair_units(low, load_elements<kSourceBf16, true>(element(s, row, 2 * u + 1), n));
}

// One unit, by any strides.
template <bool kSourceBf16, bool kPanelBf16>
COTERIE_INLINE uint32_t one_unit(const PackSource& s, int64_t row, int64_t u) {
  if constexpr (!kPanelBf16) return load_elements<kSourceBf16, false>(element(s, row, u), 1)[0];
  const uint32_t low = load_elements<kSourceBf16, true>(element(s, row, 2 * u), 1)[0] >> 16;
  if (2 * u + 1 >= s.cols) return low;
  return low | load_elements<kSourceBf16, true>(element(s, row, 2 * u + 1), 1)[0];
}

// Loads may read past row first + count where the source goes on: whole vectors are cheaper.
COTERIE_INLINE int64_t readable_rows(const PackSource& s, int64_t first) { return s.rows - first; }

template <bool kSourceBf16, bool kPanelBf16>
void pack_b_as(const PackSource& s, int64_t units, int64_t first, int64_t count, uint32_t* half) {
  constexpr int64_t kStride = 2 * kWidth;
  if (k_contiguous(s)) {
    for (int64_t u = 0; u < units; u += kWidth) {
      VU rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        rows[i] = i < count ? units_along_k<kSourceBf16, kPanelBf16>(s, first + i, u) : VU{};
      }
      transpose(rows);
      const int64_t n = units - u < kWidth ? units - u : kWidth;
      for (int64_t i = 0; i < n; ++i) store_units(half + (u + i) * kStride, rows[i]);
    }
  } else if (rows_contiguous(s)) {
    for (int64_t u = 0; u < units; ++u) {
      store_units(half + u * kStride, units_along_rows<kSourceBf16, kPanelBf16>(s, first, count, u));
    }
  } else {
    for (int64_t u = 0; u < units; ++u) {
      for (int64_t i = 0; i < kWidth; ++i) {
        half[u * kStride + i] = i < count ? one_unit<kSourceBf16, kPanelBf16>(s, first + i, u) : 0;
      }
    }
  }
}

template <bool kSourceBf16, bool kPanelBf16>
void pack_a_as(const PackSource& s, int64_t units, int64_t first, int count, uint32_t* panel) {
  const auto line = [&](int64_t u, int i) __attribute__((always_inline)) {
    return panel + (u / kChunkUnits * count + i) * kChunkUnits + u % kChunkUnits;
  };
  if (k_contiguous(s)) {
    for (int i = 0; i < count; ++i) {
      for (int64_t u = 0; u < units; u += kWidth) {
        store_units(line(u, i), units_along_k<kSourceBf16, kPanelBf16>(s, first + i, u));
      }
    }
  } else if (rows_contiguous(s)) {
    for (int64_t u = 0; u < units; u += kWidth) {
      for (int i0 = 0; i0 < count; i0 += kWidth) {
        const int64_t n = readable_rows(s, first + i0);
        VU rows[kWidth];
        for (int64_t j = 0; j < kWidth; ++j) {
          rows[j] = u + j < units ? units_along_rows<kSourceBf16, kPanelBf16>(s, first + i0, n, u + j) : VU{};
        }
        transpose(rows);
        for (int i = i0; i < count && i < i0 + kWidth; ++i) store_units(line(u, i), rows[i - i0]);
      }
    }
  } else {
    for (int64_t u = 0; u < units; ++u) {
      for (int i = 0; i < count; ++i) *line(u, i) = one_unit<kSourceBf16, kPanelBf16>(s, first + i, u);
    }
  }
}

void pack_b(const PackSource& source, DType type, int64_t first, int64_t count, uint32_t* half) {
  const int64_t units = units_of(type, source.cols);
  const bool from_bf16 = source.dtype == DType::kBF16, to_bf16 = type == DType::kBF16;
  if (from_bf16 && to_bf16) return pack_b_as<true, true>(source, units, first, count, half);
  if (from_bf16) return pack_b_as<true, false>(source, units, first, count, half);
  if (to_bf16) return pack_b_as<false, true>(source, units, first, count, half);
  pack_b_as<false, false>(source, units, first, count, half);
}

void pack_a(const PackSource& source, DType type, int64_t first, int count, uint32_t* panel) {
  const int64_t units = units_of(type, source.cols);
  const bool from_bf16 = source.dtype == DType::kBF16, to_bf16 = type == DType::kBF16;
  if (from_bf16 && to_bf16) return pack_a_as<true, true>(source, units, first, count, panel);
  if (from_bf16) return pack_a_as<true, false>(source, units, first, count, panel);
  if (to_bf16) return pack_a_as<false, true>(source, units, first, count, panel);
  pack_a_as<false, false>(source, units, first, count, panel);
}
