// The micro-kernel of compact panels: that of multiply.inl, with B expanded in registers. The sums are the same.

// A pair of units of K, and the lines of memory of another one, asked for at even distances.
template <int kRows>
COTERIE_INLINE void multiply_pair(const uint32_t* a, const VU (&units)[2][2], Ahead& ahead, VF (&sums)[kRows][2]) {
  constexpr int kLines = (CompactReader::kPair + 15) / 16;
  constexpr bool kOnce = is_only_panel(kRows, kPanelRowsBf16);
#pragma GCC unroll 32
  for (int i = 0, line = 0; i < 2 * kRows; ++i) {
    const int u = i / kRows, row = i % kRows;
    const uint32_t ai = a[row * kChunkUnits + u];
    sums[row][0] = multiply_add<true>(ai, units[u][0], sums[row][0]);
    sums[row][1] = multiply_add<true>(ai, units[u][1], sums[row][1]);
    for (; line < kLines * (i + 1) / (2 * kRows); ++line) ask_behind<kOnce>(sums[row][1], ahead.start + 16 * line);
  }
  ahead.start += 2 * ahead.step;
}

template <int kRows>
void multiply_compact(const CompactPanel& shape, const uint32_t* a, const uint32_t* compact, Ahead ahead, float* tile) {
  CompactReader b(shape, compact);
  VF sums[kRows][2] = {};
  VU units[2][2];
  for (int64_t left = units_of(PanelType::kBF16, shape.K); left > 0; left -= kChunkUnits, b.next_chunk()) {
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(a + (kChunksAhead * kRows + i) * kChunkUnits);
    if (left >= kChunkUnits && !b.has_patches()) {
#pragma GCC unroll 8
      for (int64_t u = 0; u < kChunkUnits; u += 2) {
        b.load_pair(u, units);
        multiply_pair(a + u, units, ahead, sums);
      }
    } else {
      int64_t patch = b.first_patch();
#pragma GCC unroll 1
      for (int64_t u = 0; u < kChunkUnits && u < left; u += 2) {
        b.load_patched_pair(u, patch, units);
        for (int64_t line = 0; line < CompactReader::kPair; line += 16) {
          ask_behind<is_only_panel(kRows, kPanelRowsBf16)>(units[0][0], ahead.start + line);
        }
        ahead.start += 2 * ahead.step;
        multiply_unit<true>(a + u, units[0][0], units[0][1], sums);
        if (u + 1 < left) multiply_unit<true>(a + u + 1, units[1][0], units[1][1], sums);
      }
    }
    a += kRows * kChunkUnits;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(tile + i * 2 * kWidth, sums[i][0]);
    store(tile + i * 2 * kWidth + kWidth, sums[i][1]);
  }
}

template <int... kIndex>
constexpr void fill_compact(KernelTable& table, std::integer_sequence<int, kIndex...>) {
  ((table.multiply_compact[kIndex] = multiply_compact<kIndex + 1>), ...);
}
