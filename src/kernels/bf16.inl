// The instructions of AVX-512 for bf16. Denormals become zero, and count as zero.

COTERIE_INLINE __m256i rounded(VF v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
COTERIE_INLINE __m512i rounded(VF a, VF b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }

constexpr bool kMultipliesBf16 = true;
// acc + a.low * b.low + a.high * b.high of pairs.
COTERIE_INLINE VF multiply_add_bf16(VU a, VU b, VF acc) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
