// The micro-kernel: a panel of A (kRows rows) times a panel of B (two vectors of columns), all of K in
// registers. Every sum is one chain over K in order, so a row's bits don't depend on its neighbours.

// Steps that products with a unit of B take, of a unit of A each: where bf16 has no products, A is fp32 and the halves
// of B take turns.
template <bool kBf16>
constexpr int kSteps = kBf16 && !kMultipliesBf16 ? 2 : 1;

// A unit of B as step s multiplies it.
template <bool kBf16>
COTERIE_INLINE VU in_step(int s, VU unit) {
  if constexpr (kSteps<kBf16> == 1) return unit;
  return s == 0 ? unit << 16 : unit & 0xffff0000u;
}

template <bool kBf16>
COTERIE_INLINE VF multiply_add(uint32_t a, VU b, VF acc) {
  if constexpr (kBf16 && kMultipliesBf16) return multiply_add_bf16(broadcast_unit(a), b, acc);
  return fma(broadcast(__builtin_bit_cast(float, a)), reinterpret_cast<VF>(b), acc);
}

// What meets unit u of B in a panel of A, and in the steps after the first what lies behind it; rows lie kChunkUnits
// apart.
template <bool kBf16, int kRows>
COTERIE_INLINE const uint32_t* beside_unit(const uint32_t* a, int64_t u) {
  const int64_t i = kSteps<kBf16> * u;
  return a + i / kChunkUnits * kRows * kChunkUnits + i % kChunkUnits;
}

// Chunks of K that A is asked for in advance: it comes from memory where it is larger than the caches, and its lines
// lie too oddly for hardware prefetchers. (Behind the last chunk lies the next panel.)
constexpr int64_t kChunksAhead = 4;

struct AskForNothing {
  COTERIE_INLINE void operator()(int /*step*/, int /*row*/, VF& /*sum*/) const {}
};

// A unit of K: of the rows of A times that of two vectors of columns. Behind row i of step s, ask(s, i, one of its
// sums).
template <bool kBf16, int kRows, typename Ask = AskForNothing>
COTERIE_INLINE void multiply_unit(const uint32_t* a, VU b0, VU b1, VF (&sums)[kRows][2], const Ask& ask = {}) {
#pragma GCC unroll 2
  for (int s = 0; s < kSteps<kBf16>; ++s) {
    const VU first = in_step<kBf16>(s, b0), second = in_step<kBf16>(s, b1);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const uint32_t ai = a[i * kChunkUnits + s];
      sums[i][0] = multiply_add<kBf16>(ai, first, sums[i][0]);
      sums[i][1] = multiply_add<kBf16>(ai, second, sums[i][1]);
      ask(s, i, sums[i][1]);
    }
  }
}

// The same of a panel of B, with what is asked for meanwhile: of the lines of A that come, one for each row, step s
// asks for line first_line + s.
template <bool kBf16, int kRows, bool kAsksForA>
COTERIE_INLINE void multiply_step(const uint32_t* a, const uint32_t* b, const uint32_t* ahead, const uint32_t* coming_a,
                                  int64_t first_line, VF (&sums)[kRows][2]) {
  constexpr int kMiddle = kSteps<kBf16> * kRows / 2;
  const VU b0 = load_units(b), b1 = load_units(b + kWidth);
  multiply_unit<kBf16>(a, b0, b1, sums, [&](int s, int i, VF& sum) {
    const int done = s * kRows + i;
    const int64_t line = first_line + s;
    if (done == 0) ask_behind(sum, ahead);
    if (kVectorBytes == 64 && done == kMiddle) ask_behind(sum, ahead + kWidth);
    if (kAsksForA && i == kRows - 1 && line < kRows) ask_behind(sum, coming_a + line * kChunkUnits);
  });
}

// A part of K, added to the sums.
template <bool kBf16, int kRows>
COTERIE_INLINE void multiply_units(int64_t units, const uint32_t* a, const uint32_t* b, Ahead ahead,
                                   VF (&sums)[kRows][2]) {
  constexpr int64_t kUnits = kChunkUnits / kSteps<kBf16>;  // beside a chunk of A
  for (; units >= kUnits; units -= kUnits, a += kRows * kChunkUnits, b += kUnits * 2 * kWidth) {
    const uint32_t* const coming_a = a + kChunksAhead * kRows * kChunkUnits;
#pragma GCC unroll 16  // a tenth faster than a loop
    for (int64_t u = 0; u < kUnits; ++u, ahead.start += ahead.step) {
      const int64_t step = kSteps<kBf16> * u;
      multiply_step<kBf16, kRows, true>(a + step, b + u * 2 * kWidth, ahead.start, coming_a, step, sums);
    }
  }
  for (int64_t u = 0; u < units; ++u, ahead.start += ahead.step) {
    multiply_step<kBf16, kRows, false>(a + kSteps<kBf16> * u, b + u * 2 * kWidth, ahead.start, nullptr, 0, sums);
  }
}

template <bool kBf16, int kRows>
void multiply(int64_t units, const uint32_t* a, const uint32_t* b, Ahead ahead, float* tile, bool add) {
  VF sums[kRows][2] = {};
  if (add) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sums[i][0] = load(tile + i * 2 * kWidth);
      sums[i][1] = load(tile + i * 2 * kWidth + kWidth);
    }
  }
  multiply_units<kBf16>(units, a, b, ahead, sums);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(tile + i * 2 * kWidth, sums[i][0]);
    store(tile + i * 2 * kWidth + kWidth, sums[i][1]);
  }
}

template <bool kBf16, int kRows>
COTERIE_INLINE void put_rows(const VF (&sums)[kRows][2], const PlainRows& out) {
  using Memory = RowMemory<kBf16, 2>;
  char* row = static_cast<char*>(out.start);
  const bool stream = out.stream && Memory::streams(row, out.stride_bytes);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i, row += out.stride_bytes) Memory{row, 0}.put(sums[i], stream);
}

template <bool kBf16, int kRows>
void multiply_into_rows(int64_t units, const uint32_t* a, const uint32_t* b, Ahead ahead, const PlainRows& out) {
  VF sums[kRows][2] = {};
  multiply_units<kBf16>(units, a, b, ahead, sums);
  if (out.bias) {
    const VF bias0 = load(out.bias), bias1 = load(out.bias + kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sums[i][0] += bias0;
      sums[i][1] += bias1;
    }
  }
  if (out.dtype == DType::kBF16) return put_rows<true>(sums, out);
  put_rows<false>(sums, out);
}

template <bool kBf16, int... kIndex>
constexpr void fill_multiply(KernelTable& table, std::integer_sequence<int, kIndex...>) {
  ((table.multiply[kBf16][kIndex] = multiply<kBf16, kIndex + 1>), ...);
  ((table.multiply_into_rows[kBf16][kIndex] = multiply_into_rows<kBf16, kIndex + 1>), ...);
}

// As many independent sums as the largest tile has: enough to hide the latency.
constexpr int kPeakSums = 2 * kPanelRowsF32;

template <bool kBf16>
float register_peak(int64_t steps) {
  VF sums[kPeakSums];
  for (VF& sum : sums) {
    sum = VF{};
    __asm__ volatile("" : "+x"(sum));  // the compiler would merge sums that it knows to be equal
  }
  VU a = broadcast_unit(0x3f803f80), b = a;
  __asm__ volatile("" : "+x"(a), "+x"(b));
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (VF& sum : sums) {
      if constexpr (kBf16 && kMultipliesBf16) {
        sum = multiply_add_bf16(a, b, sum);
      } else {
        sum = fma(reinterpret_cast<VF>(a), reinterpret_cast<VF>(b), sum);
      }
    }
  }
  VF total = {};
  for (const VF& sum : sums) total += sum;
  return sum_lanes(total);
}
