// The table for CPUs with AVX-512 and products of bytes (Cascade Lake and later), where bf16 has no dot product or, as
// on Emerald Rapids, one that is half as fast as products of fp32.
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels/kernel_table.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")

namespace coterie {
namespace {

constexpr bool kAsksPastCaches = false;
#include "kernels/avx512.inl"

COTERIE_INLINE __m256i rounded(VF v) { return upper_halves(round_to_bf16(v)); }
COTERIE_INLINE __m512i rounded(VF a, VF b) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  constexpr Words kUpper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                            33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(round_to_bf16(a)), reinterpret_cast<__m512i>(kUpper),
                                   reinterpret_cast<__m512i>(round_to_bf16(b)));
}

#include "kernels/bf16_as_fp32.inl"
#include "kernels/kernels.inl"

}  // namespace

constexpr KernelTable kAvx512Kernels = make_kernel_table("avx512");

}  // namespace coterie

#pragma GCC pop_options
