// The table for CPUs with AVX2 and FMA (Haswell, Zen and later).
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels/kernel_table.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace coterie {
namespace {

constexpr int kVectorBytes = 32;
// 16 registers: 6 x 2 sums, a row of B and a broadcast.
constexpr int kPanelRowsF32 = 6, kPanelRowsBf16 = 6, kPanelRowsQuantized = 4;

constexpr bool kAsksPastCaches = false;

#include "kernels/simd.inl"

COTERIE_INLINE VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
COTERIE_INLINE VF root(VF a) { return _mm256_sqrt_ps(a); }
// kWidth bytes as integers.
COTERIE_INLINE VI load_bytes(const uint8_t* p) {
  return reinterpret_cast<VI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
COTERIE_INLINE VI load_bytes(const int8_t* p) {
  return reinterpret_cast<VI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// 2 kWidth bytes as signed halves.
COTERIE_INLINE VU load_byte_pairs(const int8_t* p) {
  return reinterpret_cast<VU>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// To the nearest whole number, ties to even.
COTERIE_INLINE VI nearest(VF v) { return reinterpret_cast<VI>(_mm256_cvtps_epi32(v)); }
// acc + the sum of the two products of signed 16-bit halves of a lane.
COTERIE_INLINE VI multiply_add_halves(VU a, VU b, VI acc) {
  return acc + reinterpret_cast<VI>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

#include "kernels/without_masks.inl"

// Past the caches, p at the start of a vector of its kind.
COTERIE_INLINE void stream_floats(float* p, VF v) { _mm256_stream_ps(p, v); }
COTERIE_INLINE void stream_rounded(uint16_t* p, VF v) {
  const VH halves = __builtin_convertvector(round_to_bf16(v) >> 16, VH);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(halves));
}
COTERIE_INLINE void stream_rounded(uint16_t* p, VF a, VF b) {
  stream_rounded(p, a);
  stream_rounded(p + kWidth, b);
}

#include "kernels/kernels.inl"

}  // namespace

constexpr KernelTable kAvx2Kernels = make_kernel_table("avx2");

}  // namespace coterie

#pragma GCC pop_options
