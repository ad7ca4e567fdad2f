// The small vector type that all kernels are written in. Included inside an ISA's target region and
// anonymous namespace, after kVectorBytes and kAsksPastCaches and before the ISA's own fma, root, load_halves,
// load_bytes, load_byte_pairs, load_part, store_part, store_rounded, stream_floats, stream_rounded and
// multiply_add_bf16 (and kMultipliesBf16), which cannot be said in GCC's vector language.
//
// Everything is always_inline: a function that stayed out of line could be merged with the baseline's.

constexpr int kWidth = kVectorBytes / 4;

typedef float VF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VH __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t VB __attribute__((vector_size(kVectorBytes / 4)));
// The same in memory: any alignment, any effective type.
typedef float VFMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
typedef uint32_t VUMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
typedef uint16_t VHMemory __attribute__((vector_size(kVectorBytes / 2), aligned(1), may_alias));

#define COTERIE_INLINE inline __attribute__((always_inline))

COTERIE_INLINE VF broadcast(float value) { return value - VF{}; }
COTERIE_INLINE VU broadcast_unit(uint32_t value) { return value | VU{}; }
COTERIE_INLINE VF load(const float* p) { return *reinterpret_cast<const VFMemory*>(p); }
COTERIE_INLINE void store(float* p, VF v) { *reinterpret_cast<VFMemory*>(p) = v; }
COTERIE_INLINE VU load_units(const void* p) { return *static_cast<const VUMemory*>(p); }
COTERIE_INLINE void store_units(uint32_t* p, VU v) { *reinterpret_cast<VUMemory*>(p) = v; }
COTERIE_INLINE VF max(VF a, VF b) { return a > b ? a : b; }
COTERIE_INLINE VF magnitude(VF v) { return reinterpret_cast<VF>(reinterpret_cast<VU>(v) & 0x7fffffffu); }

// Asks for the cache line of p, with __builtin_prefetch's meaning; but a loop in which nothing else happens is not
// dropped by the compiler, as it does with those.
// kOnce: see ask_behind.
template <bool kOnce = false>
COTERIE_INLINE void ask_for(const void* p) {
  if constexpr (kOnce && kAsksPastCaches) {
    __asm__ volatile("prefetchnta %0" ::"m"(*static_cast<const char*>(p)));
  } else {
    __asm__ volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(p)));
  }
}

// Asks for the cache line of p, behind the computation of `value`. The compiler gathers the prefetches of an unrolled
// loop at its beginning, where they wait for each other, and all that is loaded then waits for them.
// kOnce: nobody reads it a second time soon, and with kAsksPastCaches it leaves the L2 cache to what is read again.
template <bool kOnce = false, typename V>
COTERIE_INLINE void ask_behind(V& value, const void* p) {
  if constexpr (kOnce && kAsksPastCaches) {
    __asm__ volatile("prefetchnta %1" : "+v"(value) : "m"(*static_cast<const char*>(p)));
  } else {
    __asm__ volatile("prefetcht0 %1" : "+v"(value) : "m"(*static_cast<const char*>(p)));
  }
}
// As far as into the L2 cache.
template <typename V>
COTERIE_INLINE void ask_into_L2_behind(V& value, const void* p) {
  __asm__ volatile("prefetcht1 %1" : "+v"(value) : "m"(*static_cast<const char*>(p)));
}

// Round to nearest even to the upper half, as to_bfloat16 does; what the lower half holds is undefined.
COTERIE_INLINE VU round_to_bf16(VF value) {
  const VU bits = reinterpret_cast<VU>(value);
  const VU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? (bits | 0x400000u) : rounded;
}

// A permutation of two vectors from a rule Index(lane), known at compile time.
template <typename Rule, int... kLane>
COTERIE_INLINE VI shuffle_mask(std::integer_sequence<int, kLane...>) {
  return VI{Rule::index(kLane)...};
}
template <typename Rule, typename V>
COTERIE_INLINE V shuffle(V a, V b) {
  return __builtin_shuffle(a, b, shuffle_mask<Rule>(std::make_integer_sequence<int, kWidth>()));
}

struct Lanes {
  static constexpr int index(int lane) { return lane; }
};

// Exchanges blocks of kStep lanes between two vectors: the butterfly of transposing and of summing.
template <int kStep>
struct LowBlocks {
  static constexpr int index(int lane) { return lane & kStep ? kWidth + (lane ^ kStep) : lane; }
};
template <int kStep>
struct HighBlocks {
  static constexpr int index(int lane) { return lane & kStep ? kWidth + lane : (lane ^ kStep); }
};
struct EvenLanes {
  static constexpr int index(int lane) { return 2 * lane; }
};
struct OddLanes {
  static constexpr int index(int lane) { return 2 * lane + 1; }
};

// Transposing goes by fours of lanes, which every ISA interleaves at the least cost: first within them, then by whole
// fours.
template <int kFirst>
struct InterleavedFours {  // two of each four of a and of b, from kFirst on
  static constexpr int index(int lane) { return lane / 4 * 4 + kFirst + lane % 4 / 2 + lane % 2 * kWidth; }
};
template <int kFirst>
struct EveryOtherFour {  // of a and then of b
  static constexpr int index(int lane) { return (2 * (lane / 4) + kFirst) * 4 + lane % 4; }
};

template <int kStep, typename Low, typename High>
COTERIE_INLINE void exchange(VU (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    const VU low = shuffle<Low>(rows[i], rows[i + kStep]);
    rows[i + kStep] = shuffle<High>(rows[i], rows[i + kStep]);
    rows[i] = low;
  }
}

COTERIE_INLINE void transpose(VU (&rows)[kWidth]) {
  exchange<2, InterleavedFours<0>, InterleavedFours<2>>(rows);
  exchange<1, InterleavedFours<0>, InterleavedFours<2>>(rows);
  if constexpr (kWidth > 4) exchange<4, EveryOtherFour<0>, EveryOtherFour<1>>(rows);
  if constexpr (kWidth > 8) exchange<8, EveryOtherFour<0>, EveryOtherFour<1>>(rows);
}

typedef uint16_t VPairs __attribute__((vector_size(kVectorBytes)));  // the halves of units
template <int kFirst, int... kHalf>
COTERIE_INLINE VU interleave_halves_from(VU a, VU b, std::integer_sequence<int, kHalf...>) {
  constexpr VPairs kOrder = {static_cast<uint16_t>(kFirst + kHalf / 2 + kHalf % 2 * 2 * kWidth)...};
  return reinterpret_cast<VU>(__builtin_shuffle(reinterpret_cast<VPairs>(a), reinterpret_cast<VPairs>(b), kOrder));
}
// Unit i of both results together has half i of a below and half i of b above.
COTERIE_INLINE void interleave_pairs(VU a, VU b, VU* units) {
  constexpr auto kHalves = std::make_integer_sequence<int, 2 * kWidth>();
  units[0] = interleave_halves_from<0>(a, b, kHalves);
  units[1] = interleave_halves_from<kWidth>(a, b, kHalves);
}

// A block [kWidth][kWidth] transposed into the rows of a tile [kWidth][2 * kWidth].
COTERIE_INLINE void turn_sums(const float* sums, float* tile) {
  VU rows[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) rows[i] = load_units(sums + i * kWidth);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) store(tile + i * 2 * kWidth, reinterpret_cast<VF>(rows[i]));
}

// Lane i of the result is the sum of the lanes of rows[i]. Destroys rows. The order of the additions
// is the same for every i.
template <int kStep = kWidth / 2, typename V>
COTERIE_INLINE V sum_each(V (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kStep; ++i) {
    rows[i] =
        shuffle<LowBlocks<kStep>>(rows[i], rows[i + kStep]) + shuffle<HighBlocks<kStep>>(rows[i], rows[i + kStep]);
  }
  if constexpr (kStep > 1) return sum_each<kStep / 2>(rows);
  return rows[0];
}

template <int kStep = kWidth / 2, typename V>
COTERIE_INLINE auto sum_lanes(V v) {
  v += shuffle<HighBlocks<kStep>>(v, v);
  if constexpr (kStep > 1) return sum_lanes<kStep / 2>(v);
  return v[0];
}

template <int kStep = kWidth / 2>
COTERIE_INLINE float max_lanes(VF v) {
  v = max(v, shuffle<HighBlocks<kStep>>(v, v));
  if constexpr (kStep > 1) return max_lanes<kStep / 2>(v);
  return v[0];
}
