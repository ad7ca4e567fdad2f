// Panels of quantized types: of A rounded on the way, of B from stored codes. panels.h says how they lie.

// One group of a row, with n elements from `first` on: its codes, high bytes first where there are two, and what
// belongs to them.
template <int64_t kGroup, int kParts>
COTERIE_INLINE Factors round_activations(const void* row, DType dtype, const QuantizedFormat& format, int64_t first,
                                         int64_t n, int8_t (&codes)[2][kGroup]) {
  alignas(64) float values[kGroup];
  const float most = load_group(row, dtype, first, n, kGroup, values);
  const float largest = kParts == 2 ? 127.0f * 256.0f : 127.0f;
  const bool zeros = most < kLeastMaximum;
  const float inverse = zeros ? 0.0f : largest / most;
  Factors f;
  f.scale = zeros ? 0.0f : most / largest;
  const int32_t sum = kParts == 2 ? round_group_wide(values, kGroup, inverse, codes[0], codes[1])
                                  : round_group(values, kGroup, inverse, 0, codes[0]);
  f.sum = format.stored_minimum ? __builtin_bit_cast(uint32_t, f.scale* static_cast<float>(kMinimumUnit * sum))
                                : static_cast<uint32_t>(-format.offset * sum);
  return f;
}

// Rows of a panel of A.
template <int64_t kGroup, int kParts>
COTERIE_INLINE void quantize_panel_a(const PackSource& s, PanelType type, int64_t first_row, int count,
                                     uint32_t* panel) {
  static_assert(kGroup <= 4 * kChunkUnits, "a group lies in one chunk");
  const int64_t units = whole_chunks(units_of(type, s.cols)), groups = groups_of(type, s.cols);
  const int64_t lines = count * kParts;
  const QuantizedFormat format = quantized_format(type);
  auto* const factors = reinterpret_cast<char*>(panel + units * lines);
  alignas(64) int8_t codes[2][kGroup];
  for (int i = 0; i < count; ++i) {
    const char* const row = element(s, first_row + i, 0);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroup, n = s.cols - first, u = first / 4;
      // What is known of a whole group makes its loops straight.
      const Factors f = n >= kGroup ? round_activations<kGroup, kParts>(row, s.dtype, format, first, kGroup, codes)
                                    : round_activations<kGroup, kParts>(row, s.dtype, format, first, n, codes);
      __builtin_memcpy(factors + (g * count + i) * static_cast<int64_t>(sizeof f), &f, sizeof f);
      for (int part = 0; part < kParts; ++part) {
        const int64_t line = u / kChunkUnits * lines + part * count + i;
        __builtin_memcpy(panel + line * kChunkUnits + u % kChunkUnits, codes[part], kGroup);
      }
    }
  }
}

template <int64_t kGroup, int kParts>
void quantize_a(const PackSource& s, PanelType type, const RowPanels& panels, int64_t first, int64_t last,
                uint32_t* memory) {
  for (int64_t p = first; p < last; ++p) {
    quantize_panel_a<kGroup, kParts>(s, type, panels.first_row(p), panels.rows(p), memory);
    memory += panels.rows(p) * a_row_units(type, s.cols);
  }
}

// Rows that are quantized already.
void gather_quantized_a(const PackSource& s, PanelType type, const RowPanels& panels, int64_t first, int64_t last,
                        uint32_t* panel) {
  constexpr int64_t kFactors = sizeof(Factors) / sizeof(uint32_t);
  const int64_t row_units = a_row_units(type, s.cols), groups = groups_of(type, s.cols);
  const int64_t parts = quantized_format(type).parts;
  const int64_t lines = whole_chunks(units_of(type, s.cols)) / kChunkUnits * parts;  // of a row
  for (int64_t p = first; p < last; ++p) {
    const int count = panels.rows(p);
    for (int i = 0; i < count; ++i) {
      const int64_t row = panels.first_row(p) + i;
      const uint32_t* const from = s.quantized + (s.gather_rows ? s.gather_rows[row] : row) * row_units;
      for (int64_t line = 0; line < lines; ++line) {
        __builtin_memcpy(panel + (line * count + i) * kChunkUnits, from + line * kChunkUnits, 4 * kChunkUnits);
      }
      const uint32_t* const factors = from + lines * kChunkUnits;
      uint32_t* const to = panel + lines * count * kChunkUnits;
      for (int64_t g = 0; g < groups; ++g) {
        __builtin_memcpy(to + (g * count + i) * kFactors, factors + g * kFactors, sizeof(Factors));
      }
    }
    panel += count * row_units;
  }
}

void pack_a(const PackSource& source, PanelType type, const RowPanels& panels, int64_t first, int64_t last,
            uint32_t* memory) {
  if (!is_quantized(type)) return pack_float_a(source, type, panels, first, last, memory);
  if (source.quantized) return gather_quantized_a(source, type, panels, first, last, memory);
  const QuantizedFormat format = quantized_format(type);
  if (format.parts == 2) return quantize_a<64, 2>(source, type, panels, first, last, memory);
  if (format.group == 64) return quantize_a<64, 1>(source, type, panels, first, last, memory);
  quantize_a<32, 1>(source, type, panels, first, last, memory);
}

// Words [first, first + n) of `count` rows of codes, transposed into a vector of columns.
COTERIE_INLINE void turn_codes(const QuantizedView& b, int64_t row, int64_t count, int64_t first, int64_t n,
                               uint32_t* out) {
  for (int64_t w = 0; w < n; w += kWidth) {
    const int64_t here = n - w < kWidth ? n - w : kWidth;
    VU rows[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      const uint32_t* const words = b.codes + (row + i) * b.row_words() + first + w;
      rows[i] = i >= count ? VU{} : here == kWidth ? load_units(words) : load_units_part(words, here);
    }
    transpose(rows);
    for (int64_t i = 0; i < here; ++i) store_units(out + (w + i) * 2 * kWidth, rows[i]);
  }
}

template <typename T>
COTERIE_INLINE void copy_column(const T* of_rows, int64_t groups, int64_t row, int64_t count, int64_t g, T* out) {
  for (int64_t i = 0; i < kWidth; ++i) out[i] = i < count ? of_rows[(row + i) * groups + g] : T{};
}

// The codes of a group of kWidth rows with what belongs to it, for one half of a panel.
COTERIE_INLINE void pack_group(const QuantizedView& b, int64_t row, int64_t count, int64_t g, int64_t first_word,
                               int64_t words, int64_t half, uint32_t* group) {
  turn_codes(b, row, count, first_word, words, group + half * kWidth);
  uint32_t* const scales = group + words * 2 * kWidth;
  if (!b.row_factors) {
    return copy_column(b.scales, b.groups(), row, count, g, reinterpret_cast<BFloat16*>(scales) + half * kWidth);
  }
  auto* const bytes = reinterpret_cast<uint8_t*>(scales) + half * kWidth;
  copy_column(b.scale_codes, b.groups(), row, count, g, bytes);
  copy_column(b.minimum_codes, b.groups(), row, count, g, reinterpret_cast<int8_t*>(bytes) + 2 * kWidth);
}

void pack_quantized_b(const QuantizedView& b, int64_t N, bool gated, int64_t first, int64_t last, uint32_t* memory) {
  const QuantizedFormat format = quantized_format(b.type);
  const int64_t words = b.row_words(), group_words = format.group_units() * format.bits / 8;
  const int64_t panel_units = b_panel_units(b.type, b.cols, 2 * kWidth);
  for (int64_t p = first; p < last; ++p, memory += panel_units) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = gated ? p * kWidth : (2 * p + half) * kWidth, row = gated ? half * N + column : column;
      uint32_t* group = memory;
      for (int64_t w = 0, g = 0; w < words; w += group_words, ++g) {
        const int64_t n = words - w < group_words ? words - w : group_words;
        pack_group(b, row, N - column, g, w, n, half, group);
        group += n * 2 * kWidth + kWidth;
      }
      auto* const factors = reinterpret_cast<float*>(group) + half * kWidth;
      if (b.row_factors) copy_column(b.row_factors, 1, row, N - column, 0, factors);
    }
  }
}
