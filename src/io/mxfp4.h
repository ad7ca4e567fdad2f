// MXFP4 (OCP Microscaling Formats v1.0): blocks of 32 elements along the innermost dimension, 4 bits each (sign, two
// bits of exponent, one of mantissa), that share a scale of 8 bits, a power of two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace coterie {

inline constexpr int64_t kMxfp4Block = 32;

// The value of a code in [0, 16).
float mxfp4_value(int code);

// 2^(scale - 127); 255 is NaN.
float mxfp4_scale(uint8_t scale);

// codes: 16 bytes per block, element 2 i in the low nibble of byte i, 2 i + 1 in the high one.
void decode_mxfp4(std::span<const std::byte> codes, std::span<const std::byte> scales, float* out);

}  // namespace coterie
