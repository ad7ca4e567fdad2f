// What ISAs without masks and scaling have in common.

#include "kernels/bf16_as_fp32.inl"

// p * 2^n, n a whole number, -126 to 128: by its exponent bits, in two halves.
COTERIE_INLINE VF times_power(VF p, VF n) {
  const VI exponent = __builtin_convertvector(n, VI), half = exponent >> 1;
  return p * reinterpret_cast<VF>((half + 127) << 23) * reinterpret_cast<VF>((exponent - half + 127) << 23);
}
COTERIE_INLINE VF reciprocal(VF x) { return 1.0f / x; }

// The first n (below kWidth) lanes of a vector in memory. Other lanes load as 0.

COTERIE_INLINE VF load_part(const float* p, int64_t n) {
  VF v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * 4);
  return v;
}
COTERIE_INLINE void store_part(float* p, VF v, int64_t n) { __builtin_memcpy(p, &v, static_cast<size_t>(n) * 4); }
COTERIE_INLINE VU load_units_part(const void* p, int64_t n) {
  VU v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * 4);
  return v;
}
COTERIE_INLINE VU load_halves_part(const uint16_t* p, int64_t n) {
  VH v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * 2);
  return __builtin_convertvector(v, VU);
}
COTERIE_INLINE VU load_halves(const uint16_t* p) {
  return __builtin_convertvector(static_cast<VH>(*reinterpret_cast<const VHMemory*>(p)), VU);
}
// Lane i has p[i] below and q[i] above.
COTERIE_INLINE VU interleave_halves(const void* p, const void* q) {
  return load_halves(static_cast<const uint16_t*>(p)) | load_halves(static_cast<const uint16_t*>(q)) << 16;
}
// Stores the upper halves.
COTERIE_INLINE void store_halves(uint16_t* p, VU v) {
  *reinterpret_cast<VHMemory*>(p) = __builtin_convertvector(v >> 16, VH);
}
// One or two vectors rounded to bf16.
COTERIE_INLINE void store_rounded(uint16_t* p, VF v) { store_halves(p, round_to_bf16(v)); }
COTERIE_INLINE void store_rounded(uint16_t* p, VF a, VF b) {
  store_rounded(p, a);
  store_rounded(p + kWidth, b);
}
COTERIE_INLINE void store_halves_part(uint16_t* p, VU v, int64_t n) {
  const VH halves = __builtin_convertvector(v >> 16, VH);
  __builtin_memcpy(p, &halves, static_cast<size_t>(n) * 2);
}

// acc + the sum of the four products of unsigned bytes of a lane of b and signed bytes of a: two by two, as 16-bit
// numbers, in which nothing overflows.
COTERIE_INLINE VI multiply_add_bytes(VU b, uint32_t a, VI acc) {
  const auto byte = [a](int i) { return static_cast<uint32_t>(static_cast<int8_t>(a >> 8 * i)); };
  const uint32_t even = (byte(0) & 0xffffu) | byte(2) << 16, odd = (byte(1) & 0xffffu) | byte(3) << 16;
  acc = multiply_add_halves(b & 0x00ff00ffu, broadcast_unit(even), acc);
  return multiply_add_halves((b >> 8) & 0x00ff00ffu, broadcast_unit(odd), acc);
}

// mxfp4_doubled of every byte.
COTERIE_INLINE VU mxfp4_values(VU codes) {
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes)));
  const auto code = reinterpret_cast<Bytes>(codes), m = code & 7;
  const Bytes magnitude = m - (m > 4) - (m > 5) - 3 * (m > 6), negative = code > 7;
  return reinterpret_cast<VU>(((magnitude ^ negative) - negative) + 12);
}
