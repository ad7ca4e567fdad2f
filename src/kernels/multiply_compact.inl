// The micro-kernel of compact panels: that of multiply.inl, with B expanded in registers. The sums are the same.

// A pair of units of K, and the lines of memory of another one, asked for at even distances. `a`: beside the first.
template <int kRows>
COTERIE_INLINE void multiply_pair(const uint32_t* a, const VU (&units)[2][2], Ahead& ahead, VF (&sums)[kRows][2]) {
  constexpr int kLines = (CompactReader::kPair + 15) / 16;
  constexpr int kTurns = 2 * kSteps<true> * kRows;
  constexpr bool kOnce = is_only_panel(kRows, kPanelRowsBf16);
#pragma GCC unroll 2
  for (int u = 0; u < 2; ++u) {
    multiply_unit<true>(a + kSteps<true> * u, units[u][0], units[u][1], sums, [&](int s, int i, VF& sum) {
      const int turn = (kSteps<true> * u + s) * kRows + i;
#pragma GCC unroll 4
      for (int line = kLines * turn / kTurns; line < kLines * (turn + 1) / kTurns; ++line) {
        ask_behind<kOnce>(sum, ahead.start + 16 * line);
      }
    });
  }
  ahead.start += 2 * ahead.step;
}

template <int kRows>
void multiply_compact(const CompactPanel& shape, const uint32_t* a, const uint32_t* compact, Ahead ahead, float* tile) {
  CompactReader b(shape, compact);
  VF sums[kRows][2] = {};
  VU units[2][2];
  for (int64_t left = units_of(PanelType::kBF16, shape.K); left > 0; left -= kChunkUnits, b.next_chunk()) {
    for (int i = 0; i < kSteps<true> * kRows; ++i) {
      __builtin_prefetch(a + (kSteps<true> * kChunksAhead * kRows + i) * kChunkUnits);
    }
    if (left >= kChunkUnits && !b.has_patches()) {
#pragma GCC unroll 8
      for (int64_t u = 0; u < kChunkUnits; u += 2) {
        b.load_pair(u, units);
        multiply_pair(beside_unit<true, kRows>(a, u), units, ahead, sums);
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
        const uint32_t* const beside = beside_unit<true, kRows>(a, u);
        multiply_unit<true>(beside, units[0][0], units[0][1], sums);
        if (u + 1 < left) multiply_unit<true>(beside + kSteps<true>, units[1][0], units[1][1], sums);
      }
    }
    a += kSteps<true> * kRows * kChunkUnits;
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
