// The table for any x86-64 CPU: SSE2, which the baseline ABI promises. Also the model of a new port.
#include <emmintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels/kernel_table.h"

namespace coterie {
namespace {

constexpr int kVectorBytes = 16;
// 16 registers: 6 x 2 sums, a row of B, a broadcast and a product.
constexpr int kPanelRowsF32 = 6, kPanelRowsBf16 = 6, kPanelRowsQuantized = 4;

constexpr bool kAsksPastCaches = false;

#include "kernels/simd.inl"

COTERIE_INLINE VF fma(VF a, VF b, VF c) { return a * b + c; }
COTERIE_INLINE VF root(VF a) {
  for (int lane = 0; lane < kWidth; ++lane) a[lane] = std::sqrt(a[lane]);
  return a;
}
// kWidth bytes as integers.
COTERIE_INLINE VI load_bytes(const uint8_t* p) { return VI{p[0], p[1], p[2], p[3]}; }
COTERIE_INLINE VI load_bytes(const int8_t* p) { return VI{p[0], p[1], p[2], p[3]}; }
// 2 kWidth bytes as signed halves.
COTERIE_INLINE VU load_byte_pairs(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<VU>(_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8));
}

// To the nearest whole number, ties to even.
COTERIE_INLINE VI nearest(VF v) { return reinterpret_cast<VI>(_mm_cvtps_epi32(v)); }
// acc + the sum of the two products of signed 16-bit halves of a lane.
COTERIE_INLINE VI multiply_add_halves(VU a, VU b, VI acc) {
  return acc + reinterpret_cast<VI>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}

#include "kernels/without_masks.inl"

// Where vectors are short, stores past the caches gain nothing.
COTERIE_INLINE void stream_floats(float* p, VF v) { store(p, v); }
COTERIE_INLINE void stream_rounded(uint16_t* p, VF v) { store_rounded(p, v); }
COTERIE_INLINE void stream_rounded(uint16_t* p, VF a, VF b) { store_rounded(p, a, b); }

#include "kernels/kernels.inl"

}  // namespace

constexpr KernelTable kGenericKernels = make_kernel_table("generic");

}  // namespace coterie
