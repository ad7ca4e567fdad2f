// The table for CPUs with AVX-512 and a fast dot product of bf16 (Zen 4 and later).
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels/kernel_table.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c,bmi2")

namespace coterie {
namespace {

#include "kernels/avx512.inl"

// Denormals become zero.
COTERIE_INLINE __m256i rounded(VF v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
COTERIE_INLINE __m512i rounded(VF a, VF b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }

constexpr bool kMultipliesBf16 = true;
// acc + a.low * b.low + a.high * b.high of bf16 pairs; denormals count as zero.
COTERIE_INLINE VF multiply_add_bf16(VU a, VU b, VF acc) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

#include "kernels/kernels.inl"

}  // namespace

constexpr KernelTable kAvx512Bf16Kernels = make_kernel_table("avx512_bf16");

}  // namespace coterie

#pragma GCC pop_options
