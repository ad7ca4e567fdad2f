// The micro-kernel of compact panels: that of multiply.inl, with B expanded in registers. The sums are the same.

COTERIE_INLINE void ask_for_pair(Ahead& ahead) {
  for (int64_t line = 0; line < CompactReader::kPair; line += 16) __builtin_prefetch(ahead.start + line);
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
        ask_for_pair(ahead);
        multiply_unit<true>(a + u, units[0][0], units[0][1], sums);
        multiply_unit<true>(a + u + 1, units[1][0], units[1][1], sums);
      }
    } else {
      int64_t patch = b.first_patch();
#pragma GCC unroll 1
      for (int64_t u = 0; u < kChunkUnits && u < left; u += 2) {
        b.load_patched_pair(u, patch, units);
        ask_for_pair(ahead);
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
