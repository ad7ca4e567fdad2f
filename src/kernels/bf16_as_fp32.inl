// Products of bf16 by those of fp32, which hold each exactly: for ISAs that have none, or slow ones. A of a product is
// widened when it is packed, once for all panels of B that it meets, and B in registers, or for many rows when it is
// packed, too (gemm_plan.cc).

constexpr bool kMultipliesBf16 = false;

// acc + a.low * b.low + a.high * b.high of bf16 pairs. Each product is exact in fp32.
COTERIE_INLINE VF multiply_add_bf16(VU a, VU b, VF acc) {
  acc = fma(reinterpret_cast<VF>(a << 16), reinterpret_cast<VF>(b << 16), acc);
  return fma(reinterpret_cast<VF>(a & 0xffff0000u), reinterpret_cast<VF>(b & 0xffff0000u), acc);
}
