// What the tables with AVX-512 have in common, whether they have instructions for bf16 or not.

constexpr int kVectorBytes = 64;
// 32 registers: 12 x 2 sums, a row of B, a broadcast, and some to spare. 24 independent sums hide the
// latency of two FMA units (2 x 4 cycles) three times over.
constexpr int kPanelRowsF32 = 12, kPanelRowsBf16 = 12, kPanelRowsQuantized = 12;

#include "kernels/simd.inl"

// The table's own: one or two vectors rounded to bf16.
COTERIE_INLINE __m256i rounded(VF v);
COTERIE_INLINE __m512i rounded(VF a, VF b);

COTERIE_INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
COTERIE_INLINE VF root(VF a) { return _mm512_maskz_sqrt_ps(0xffff, a); }

// p * 2^n, n a whole number.
COTERIE_INLINE VF times_power(VF p, VF n) { return _mm512_maskz_scalef_ps(0xffff, p, n); }
// 1 / x to a unit in the last place for x from 1 on, 0 above 1e38 (NaN stays): an estimate of 14 bits and one step of
// Newton's.
COTERIE_INLINE VF reciprocal(VF x) {
  const __mmask16 finite = _mm512_cmp_ps_mask(x, broadcast(1e38f), _CMP_NGT_UQ);
  const VF estimate = _mm512_maskz_rcp14_ps(0xffff, x);
  return _mm512_maskz_fmadd_ps(finite, fma(-x, estimate, broadcast(1.0f)), estimate, estimate);
}

COTERIE_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
COTERIE_INLINE VF load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
COTERIE_INLINE void store_part(float* p, VF v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
COTERIE_INLINE VU load_units_part(const void* p, int64_t n) {
  return reinterpret_cast<VU>(_mm512_maskz_loadu_epi32(first_lanes(n), p));
}
COTERIE_INLINE VU load_halves_part(const uint16_t* p, int64_t n) {
  return __builtin_convertvector(reinterpret_cast<VH>(_mm256_maskz_loadu_epi16(first_lanes(n), p)), VU);
}
COTERIE_INLINE VU load_halves(const uint16_t* p) {
  return reinterpret_cast<VU>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
// Lane i has p[i] below and q[i] above.
COTERIE_INLINE VU interleave_halves(const void* p, const void* q) {
  typedef int16_t Words __attribute__((vector_size(64)));
  constexpr Words kPairs = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  const __m512i high = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(q)));
  return reinterpret_cast<VU>(_mm512_permutex2var_epi16(low, reinterpret_cast<__m512i>(kPairs), high));
}
// kWidth bytes as integers.
COTERIE_INLINE VI load_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<VI>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes));
}
COTERIE_INLINE VI load_bytes(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<VI>(_mm512_maskz_cvtepi8_epi32(0xffff, bytes));
}
// 2 kWidth bytes as signed halves.
COTERIE_INLINE VU load_byte_pairs(const int8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<VU>(_mm512_maskz_cvtepi8_epi16(0xffffffff, bytes));
}
// Stores the upper halves.
COTERIE_INLINE __m256i upper_halves(VU v) {
  return _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v >> 16));
}
COTERIE_INLINE void store_halves(uint16_t* p, VU v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper_halves(v));
}
COTERIE_INLINE void store_halves_part(uint16_t* p, VU v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), upper_halves(v));
}

COTERIE_INLINE void store_rounded(uint16_t* p, VF v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v)); }
COTERIE_INLINE void store_rounded(uint16_t* p, VF a, VF b) { _mm512_storeu_si512(p, rounded(a, b)); }

// Past the caches, p at a multiple of what is stored.
COTERIE_INLINE void stream_floats(float* p, VF v) { _mm512_stream_ps(p, v); }
COTERIE_INLINE void stream_rounded(uint16_t* p, VF v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded(v));
}
COTERIE_INLINE void stream_rounded(uint16_t* p, VF a, VF b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), rounded(a, b));
}

// acc + the sum of the two products of signed 16-bit halves of a lane.
COTERIE_INLINE VI multiply_add_halves(VU a, VU b, VI acc) {
  return reinterpret_cast<VI>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

// To the nearest whole number, ties to even.
COTERIE_INLINE VI nearest(VF v) { return reinterpret_cast<VI>(_mm512_maskz_cvtps_epi32(0xffff, v)); }
// acc + the sum of the four products of unsigned bytes of a lane of b and signed bytes of a.
COTERIE_INLINE VI multiply_add_bytes(VU b, uint32_t a, VI acc) {
  return reinterpret_cast<VI>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(b),
                                                  _mm512_set1_epi32(static_cast<int>(a))));
}

// mxfp4_doubled of every byte.
COTERIE_INLINE VU mxfp4_values(VU codes) {
  const __m512i table =
      _mm512_maskz_broadcast_i32x4(0xffff, _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  return reinterpret_cast<VU>(_mm512_shuffle_epi8(table, reinterpret_cast<__m512i>(codes)));
}
