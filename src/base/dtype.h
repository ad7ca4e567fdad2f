// Element types of tensors and files, and bfloat16 as the upper half of a float32.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace coterie {

enum class DType : uint8_t { kF32, kBF16, kF16, kI8, kU8, kI32, kI64 };

// Bytes per element.
constexpr size_t dtype_size(DType dtype) {
  constexpr size_t kSizes[] = {4, 2, 2, 1, 1, 4, 8};
  return kSizes[static_cast<size_t>(dtype)];
}
std::string_view dtype_name(DType dtype);      // "fp32", "bf16", ...
DType dtype_from_name(std::string_view name);  // InvalidArgument for another name

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }
inline float to_float(float value) { return value; }

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
inline BFloat16 to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

float half_to_float(uint16_t bits);  // IEEE binary16, subnormals and infinities included

// Converts n elements between kF32, kBF16 and kF16 (scalar; for loading, not for hot loops).
void convert_to_float(const void* source, DType dtype, float* out, size_t n);
void convert_from_float(const float* source, DType dtype, void* out, size_t n);

}  // namespace coterie
