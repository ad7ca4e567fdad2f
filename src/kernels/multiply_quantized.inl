// The micro-kernel of quantized types: products of codes are summed up in integers within a group, and groups in fp32,
// in order, so that a row's bits don't depend on its neighbours.

// The codes of a pair of units, [unit][vector of columns].
template <PanelType kType>
COTERIE_INLINE void load_codes(const uint32_t* b, VU (&codes)[2][2]) {
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    if constexpr (quantized_format(kType).bits == 8) {
      codes[0][v] = load_units(b + v * kWidth);
      codes[1][v] = load_units(b + (2 + v) * kWidth);
    } else {
      const VU both = load_units(b + v * kWidth);
      codes[0][v] = both & 0x0f0f0f0fu;
      codes[1][v] = (both >> 4) & 0x0f0f0f0fu;
    }
    if constexpr (kType == PanelType::kMxfp4) {
      codes[0][v] = mxfp4_values(codes[0][v]);
      codes[1][v] = mxfp4_values(codes[1][v]);
    }
  }
}

// With AVX-512 and one line of A a load of codes of 8 bits comes with so few other instructions that the processor runs
// further ahead of what it waits for than prefetches would, and these only take the loads' places.
template <PanelType kType, int kLines>
constexpr bool kAsksForCodes = kVectorBytes < 64 || kLines > 1 || quantized_format(kType).bits < 8;

// dots += `units` units of one chunk of A, a multiple of 2. What lies `ahead` bytes behind is asked for.
template <PanelType kType, int kLines>
COTERIE_INLINE void multiply_codes(const uint32_t* a, const uint32_t* b, int64_t ahead, int64_t units,
                                   VI (&dots)[kLines][2]) {
  constexpr int64_t kPairUnits = 2 * quantized_format(kType).bits / 8 * 2 * kWidth;  // of B
  constexpr int64_t kPairLines = (kPairUnits + 15) / 16;
  constexpr bool kOnce = is_only_panel(kLines, kPanelRowsQuantized);
#pragma GCC unroll 8
  for (int64_t u = 0; u < units; u += 2, b += kPairUnits) {
    VU codes[2][2];
    load_codes<kType>(b, codes);
    const char* const coming = reinterpret_cast<const char*>(b) + ahead;
#pragma GCC unroll 32
    for (int64_t i = 0, line = 0; i < 2 * kLines; ++i) {
      const int64_t row = i / 2, half = i % 2;
      const uint32_t ai = a[row * kChunkUnits + u + half];
      dots[row][0] = multiply_add_bytes(codes[half][0], ai, dots[row][0]);
      dots[row][1] = multiply_add_bytes(codes[half][1], ai, dots[row][1]);
      if constexpr (!kAsksForCodes<kType, kLines>) continue;
      for (; line < kPairLines * (i + 1) / (2 * kLines); ++line) {
        ask_behind<kOnce>(dots[row][1], coming + 64 * line);
      }
    }
  }
}

// Sums of a panel that are worked on group by group: in registers with few rows, else in the tile.
template <int kRows, int kLines>
struct GroupSums {
  static constexpr bool kInRegisters = kRows + kLines <= 12;
  float* tile;
  VF registers[kInRegisters ? kRows : 1][2] = {};

  COTERIE_INLINE explicit GroupSums(float* panel_tile) : tile(panel_tile) {
    if constexpr (!kInRegisters) {
#pragma GCC unroll 32
      for (int i = 0; i < 2 * kRows; ++i) store(tile + i * kWidth, VF{});
    }
  }

  COTERIE_INLINE VF get(int row, int v) const {
    if constexpr (kInRegisters) return registers[row][v];
    return load(tile + (2 * row + v) * kWidth);
  }
  COTERIE_INLINE void set(int row, int v, VF sum) {
    if constexpr (kInRegisters) {
      registers[row][v] = sum;
    } else {
      store(tile + (2 * row + v) * kWidth, sum);
    }
  }
  // Times the columns' factors where there are any.
  COTERIE_INLINE void finish(const float* factors) const {
    if (kInRegisters || factors) {
#pragma GCC unroll 32
      for (int i = 0; i < 2 * kRows; ++i) {
        const VF sum = get(i / 2, i % 2);
        store(tile + i * kWidth, factors ? sum * load(factors + i % 2 * kWidth) : sum);
      }
    }
  }
};

// Scales of vector v of a group, and minimums where they are stored.
template <bool kBytes>
COTERIE_INLINE VF load_scales(const uint32_t* group, int v) {
  if constexpr (kBytes) return to_floats(load_bytes(reinterpret_cast<const uint8_t*>(group) + v * kWidth));
  return reinterpret_cast<VF>(load_halves(reinterpret_cast<const uint16_t*>(group) + v * kWidth) << 16);
}
COTERIE_INLINE VF load_minimums(const uint32_t* group, int v) {
  return to_floats(load_bytes(reinterpret_cast<const int8_t*>(group) + (2 + v) * kWidth));
}

// Of the rows of a panel of A and one group, where they lie.
struct GroupFactors {
  const uint32_t* words;

  COTERIE_INLINE uint32_t sum(int row) const { return words[2 * row + 1]; }
  COTERIE_INLINE float scale(int row) const { return __builtin_bit_cast(float, words[2 * row]); }
};
static_assert(sizeof(Factors) == 2 * sizeof(uint32_t) && offsetof(Factors, sum) == sizeof(uint32_t));

// sums += scales of A and B * dots, and minimums * scales and sums of A.
template <PanelType kType, int kRows, int kLines>
COTERIE_INLINE void add_group(const GroupFactors& factors, const uint32_t* scales, const VI (&dots)[kLines][2],
                              GroupSums<kRows, kLines>& sums) {
  constexpr bool kMinimum = quantized_format(kType).stored_minimum;
  // The second part of the code is the lower one.
  const auto dot = [&](int i, int v) {
    return kLines == kRows ? dots[i][v] : (dots[i][v] << 8) + dots[kLines - kRows + i][v];
  };
  const VF scale[2] = {load_scales<kMinimum>(scales, 0), load_scales<kMinimum>(scales, 1)};
  VF minimum[2] = {};
  if constexpr (kMinimum) {
    minimum[0] = load_minimums(scales, 0);
    minimum[1] = load_minimums(scales, 1);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const VF scale_a = broadcast(factors.scale(i));
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      VF sum = fma(to_floats(dot(i, v)), scale[v] * scale_a, sums.get(i, v));
      if constexpr (kMinimum) sum = fma(minimum[v], broadcast(__builtin_bit_cast(float, factors.sum(i))), sum);
      sums.set(i, v, sum);
    }
  }
}

template <PanelType kType, int kRows>
void multiply_quantized(int64_t K, const uint32_t* a, const uint32_t* b, int64_t ahead, float* tile) {
  constexpr QuantizedFormat kFormat = quantized_format(kType);
  constexpr int64_t kGroupUnits = kFormat.group_units();
  constexpr int64_t kStep = kGroupUnits < kChunkUnits ? kGroupUnits : kChunkUnits;
  constexpr int64_t kUnitOfB = kFormat.bits * 2 * kWidth / 8;
  constexpr int kLines = kRows * kFormat.parts;
  const int64_t units = units_of(kType, K);
  GroupFactors factors = {a + whole_chunks(units) * kLines};
  GroupSums<kRows, kLines> sums(tile);
  for (int64_t first = 0; first < units; first += kGroupUnits) {
    VI dots[kLines][2] = {};
    if constexpr (!kFormat.stored_minimum) {
      for (int i = 0; i < kRows; ++i) {
        VI(&start)[2] = dots[kLines - kRows + i];
        start[0] = start[1] = reinterpret_cast<VI>(broadcast_unit(factors.sum(i)));
      }
    }
    const int64_t end = units - first < kGroupUnits ? units : first + kGroupUnits;
    for (int64_t u = first; u < end; u += kStep) {
      const uint32_t* const chunk = a + u / kChunkUnits * kLines * kChunkUnits + u % kChunkUnits;
      if (end - u >= kStep) {
        multiply_codes<kType, kLines>(chunk, b, ahead, kStep, dots);
        b += kStep * kUnitOfB;
      } else {
        multiply_codes<kType, kLines>(chunk, b, ahead, end - u, dots);
        b += (end - u) * kUnitOfB;
      }
    }
    if constexpr (kAsksForCodes<kType, kLines>) {
      ask_behind(dots[0][0], reinterpret_cast<const char*>(b) + ahead);  // scales, too
    }
    add_group<kType>(factors, b, dots, sums);
    b += kWidth;
    factors.words += 2 * kRows;
  }
  if constexpr (kFormat.stored_minimum) {
    for (int v = 0; v < 2; ++v) ask_for(reinterpret_cast<const char*>(b + v * kWidth) + ahead);
  }
  sums.finish(kFormat.stored_minimum ? reinterpret_cast<const float*>(b) : nullptr);
}

template <PanelType kType, int... kIndex>
constexpr void fill_quantized(KernelTable& table, std::integer_sequence<int, kIndex...>) {
  ((table.multiply_quantized[index_of(kType) - kFirstQuantized][kIndex] = multiply_quantized<kType, kIndex + 1>), ...);
}
template <PanelType kType>
constexpr void fill_quantized(KernelTable& table) {
  constexpr int kRows = kPanelRowsQuantized / quantized_format(kType).parts;
  table.panel_rows[index_of(kType)] = kRows;
  fill_quantized<kType>(table, std::make_integer_sequence<int, kRows>());
}
