#include "io/ggml_type.h"

#include <cmath>
#include <cstring>

#include "base/dtype.h"

namespace coterie {
namespace {

float load_half(const std::byte* source) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof(bits));
  return half_to_float(bits);
}

int low_nibble(std::byte b) { return std::to_integer<int>(b & std::byte{15}); }
int high_nibble(std::byte b) { return std::to_integer<int>(b >> 4); }
float signed_byte(std::byte b) { return static_cast<float>(static_cast<int8_t>(b)); }

template <DType kDType>
void convert(const std::byte* blocks, int64_t num_blocks, float* out) {
  convert_to_float(blocks, kDType, out, static_cast<size_t>(num_blocks));
}

// Each function below turns one block into its floats. d and m are half precision; q are the stored
// integers. Products are rounded in the order of ggml's own dequantization, so results are equal bit
// by bit.

// 32 elements: d, q[32] int8.  x = d q
void q8_0(const std::byte* block, float* out) {
  const float d = load_half(block);
  for (int i = 0; i < 32; ++i) out[i] = d * signed_byte(block[2 + i]);
}

// 32 elements: d, 16 bytes; byte i holds q of elements i (low nibble) and i + 16.  x = d (q - 8)
void q4_0(const std::byte* block, float* out) {
  const float d = load_half(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(low_nibble(block[2 + i]) - 8);
    out[i + 16] = d * static_cast<float>(high_nibble(block[2 + i]) - 8);
  }
}

// As Q4_0 with a minimum: d, m, 16 bytes.  x = d q + m
void q4_1(const std::byte* block, float* out) {
  const float d = load_half(block);
  const float m = load_half(block + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(low_nibble(block[4 + i])) + m;
    out[i + 16] = d * static_cast<float>(high_nibble(block[4 + i])) + m;
  }
}

uint32_t load_bits(const std::byte* source) {
  uint32_t bits;
  std::memcpy(&bits, source, sizeof(bits));
  return bits;
}

// q of element i of 32: 4 bits as in Q4_0, and bit i of `high` above them.
int five_bits(const std::byte* nibbles, uint32_t high, int i) {
  const int low = i < 16 ? low_nibble(nibbles[i]) : high_nibble(nibbles[i - 16]);
  return low | static_cast<int>(high >> i & 1) << 4;
}

// 32 elements: d, 32 fifth bits, 16 bytes of nibbles.  x = d (q - 16)
void q5_0(const std::byte* block, float* out) {
  const float d = load_half(block);
  const uint32_t high = load_bits(block + 2);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(five_bits(block + 6, high, i) - 16);
}

// As Q5_0 with a minimum: d, m, fifth bits, nibbles.  x = d q + m
void q5_1(const std::byte* block, float* out) {
  const float d = load_half(block);
  const float m = load_half(block + 2);
  const uint32_t high = load_bits(block + 4);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(five_bits(block + 8, high, i)) + m;
}

// 256 elements in 8 groups of 32, each with a 6-bit scale s and minimum n: d, m, 12 bytes of s and n,
// 128 bytes of nibbles.  x = (d s) q - (m n)
// Bytes 0-3 hold s of groups 0-3 in their lower 6 bits, bytes 4-7 n of the same groups; bytes 8-11
// hold the lower 4 bits of s (low nibble) and n (high nibble) of groups 4-7, whose upper 2 bits are
// the upper 2 bits of bytes 0-3 and 4-7. Of each 32 bytes of nibbles, the low ones are an even
// group, the high ones the odd group after it.
int six_bits(const std::byte* packed, int group, int first) {
  if (group < 4) return std::to_integer<int>(packed[first + group] & std::byte{63});
  const std::byte low = packed[4 + group];
  return (first == 0 ? low_nibble(low) : high_nibble(low)) | std::to_integer<int>(packed[first + group - 4] >> 6) << 4;
}

// fifth: for Q5_K, 32 bytes whose bit g is the fifth of group g's elements; else null.
void k_groups(const std::byte* block, const std::byte* fifth, const std::byte* nibbles, float* out) {
  const float d = load_half(block);
  const float m = load_half(block + 2);
  for (int group = 0; group < 8; ++group) {
    const float scale = d * static_cast<float>(six_bits(block + 4, group, 0));
    const float minimum = m * static_cast<float>(six_bits(block + 4, group, 4));
    for (int i = 0; i < 32; ++i) {
      const std::byte b = nibbles[group / 2 * 32 + i];
      int q = group % 2 == 0 ? low_nibble(b) : high_nibble(b);
      if (fifth) q |= std::to_integer<int>(fifth[i] >> group & std::byte{1}) << 4;
      *out++ = scale * static_cast<float>(q) - minimum;
    }
  }
}

void q4_k(const std::byte* block, float* out) { k_groups(block, nullptr, block + 16, out); }

// As Q4_K with a fifth bit: d, m, 12 bytes of s and n, 32 bytes of fifth bits, 128 bytes of nibbles.
void q5_k(const std::byte* block, float* out) { k_groups(block, block + 16, block + 48, out); }

// 32 elements: an exponent e, 16 bytes; byte i holds the codes of elements i (low nibble) and i + 16.
// x = 2^(e - 128) v, v being twice the code's value, so that it is whole
void mxfp4(const std::byte* block, float* out) {
  constexpr float kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const float d = std::ldexp(1.0f, std::to_integer<int>(block[0]) - 128);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * kTwice[low_nibble(block[1 + i])];
    out[i + 16] = d * kTwice[high_nibble(block[1 + i])];
  }
}

// 256 elements in 16 groups of 16, each with an int8 scale s: 128 bytes of the lower 4 bits of q, 64
// of the upper 2, 16 scales, d.  x = (d s) (q - 32)
// Each half of 128 elements is 4 runs of 32. Its 64 lower bytes hold runs 0 and 1 in the low nibbles,
// 2 and 3 in the high ones; its 32 upper bytes hold 2 bits of every run, run 0 in the lowest.
void q6_k(const std::byte* block, float* out) {
  const float d = load_half(block + 208);
  const std::byte* scales = block + 192;
  for (int half = 0; half < 2; ++half) {
    const std::byte* lower = block + half * 64;
    const std::byte* upper = block + 128 + half * 32;
    for (int run = 0; run < 4; ++run) {
      for (int i = 0; i < 32; ++i) {
        const std::byte b = lower[run % 2 * 32 + i];
        const int low = run < 2 ? low_nibble(b) : high_nibble(b);
        const int high = std::to_integer<int>((upper[i] >> (2 * run)) & std::byte{3});
        const float scale = d * signed_byte(scales[half * 8 + run * 2 + i / 16]);
        *out++ = scale * static_cast<float>((low | high << 4) - 32);
      }
    }
  }
}

// 256 elements in 2 halves of 128 elements, each 4 runs of 32: bits 2 r and 2 r + 1 of a half's 32 bytes are run r.
int two_bits(const std::byte* packed, int i) {
  return std::to_integer<int>(packed[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & std::byte{3});
}

// 256 elements in 16 groups of 16, each with a scale s and a minimum n of 4 bits: 16 bytes of s (low nibble) and n
// (high nibble), 64 bytes of q, d, m.  x = (d s) q - (m n)
void q2_k(const std::byte* block, float* out) {
  const float d = load_half(block + 80);
  const float m = load_half(block + 82);
  for (int group = 0; group < 16; ++group) {
    const float scale = d * static_cast<float>(low_nibble(block[group]));
    const float minimum = m * static_cast<float>(high_nibble(block[group]));
    for (int i = 16 * group; i < 16 * group + 16; ++i) {
      *out++ = scale * static_cast<float>(two_bits(block + 16, i)) - minimum;
    }
  }
}

// 256 elements in 16 groups of 16, each with a 6-bit scale s: 32 bytes of the third bits of q, 64 of the lower two, 12
// of scales, d.  x = (d (s - 32)) (q - 4)
// Bit r of the third bits' byte i is that of element 32 r + i. Bytes 0-7 of the scales hold the lower 4 bits of groups
// 0-7 (low nibble) and 8-15 (high nibble); bits 2 k and 2 k + 1 of byte 8 + j the upper 2 bits of group 4 k + j.
void q3_k(const std::byte* block, float* out) {
  const float d = load_half(block + 108);
  const std::byte* scales = block + 96;
  for (int group = 0; group < 16; ++group) {
    const std::byte lower = scales[group % 8];
    const int upper = std::to_integer<int>(scales[8 + group % 4] >> (group / 4 * 2) & std::byte{3});
    const int s = (group < 8 ? low_nibble(lower) : high_nibble(lower)) | upper << 4;
    const float scale = d * static_cast<float>(s - 32);
    for (int i = 16 * group; i < 16 * group + 16; ++i) {
      const int third = std::to_integer<int>(block[i % 32] >> (i / 32) & std::byte{1});
      *out++ = scale * static_cast<float>((two_bits(block + 32, i) | third << 2) - 4);
    }
  }
}

// 32 elements in 16 bytes as in Q4_0, whose codes stand for these values v.  x = d v
void nonlinear(const std::byte* nibbles, float d, float* out) {
  constexpr float kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  for (int i = 0; i < 16; ++i) {
    out[i] = d * kValues[low_nibble(nibbles[i])];
    out[i + 16] = d * kValues[high_nibble(nibbles[i])];
  }
}

void iq4_nl(const std::byte* block, float* out) { nonlinear(block + 2, load_half(block), out); }

// 256 elements in 8 groups of 32, each as in IQ4_NL with a 6-bit scale s: d, 2 bytes of the upper 2 bits of s (group 0
// in the lowest), 4 of the lower 4 bits (two groups a byte, the even one in the low nibble), 128 of codes. x = (d (s -
// 32)) v
void iq4_xs(const std::byte* block, float* out) {
  const float d = load_half(block);
  for (int group = 0; group < 8; ++group) {
    const std::byte lower = block[4 + group / 2];
    const int upper = std::to_integer<int>(block[2 + group / 4] >> (group % 4 * 2) & std::byte{3});
    const int s = (group % 2 == 0 ? low_nibble(lower) : high_nibble(lower)) | upper << 4;
    nonlinear(block + 8 + 16 * group, d * static_cast<float>(s - 32), out + 32 * group);
  }
}

template <void (*kBlock)(const std::byte*, float*), int kElements, int kBytes>
void each(const std::byte* blocks, int64_t num_blocks, float* out) {
  for (int64_t i = 0; i < num_blocks; ++i) kBlock(blocks + i * kBytes, out + i * kElements);
}

// Ids that are missing were given up by ggml, or are never stored (Q8_1, Q8_K). The types without a
// function can be listed, not read.
constexpr GgmlType kTypes[] = {
    {0, "F32", 1, 4, convert<DType::kF32>},
    {1, "F16", 1, 2, convert<DType::kF16>},
    {2, "Q4_0", 32, 18, each<q4_0, 32, 18>},
    {3, "Q4_1", 32, 20, each<q4_1, 32, 20>},
    {6, "Q5_0", 32, 22, each<q5_0, 32, 22>},
    {7, "Q5_1", 32, 24, each<q5_1, 32, 24>},
    {8, "Q8_0", 32, 34, each<q8_0, 32, 34>},
    {10, "Q2_K", 256, 84, each<q2_k, 256, 84>},
    {11, "Q3_K", 256, 110, each<q3_k, 256, 110>},
    {12, "Q4_K", 256, 144, each<q4_k, 256, 144>},
    {13, "Q5_K", 256, 176, each<q5_k, 256, 176>},
    {14, "Q6_K", 256, 210, each<q6_k, 256, 210>},
    {16, "IQ2_XXS", 256, 66},
    {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98},
    {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18, each<iq4_nl, 32, 18>},
    {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},
    {23, "IQ4_XS", 256, 136, each<iq4_xs, 256, 136>},
    {24, "I8", 1, 1},
    {25, "I16", 1, 2},
    {26, "I32", 1, 4},
    {27, "I64", 1, 8},
    {28, "F64", 1, 8},
    {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2, convert<DType::kBF16>},
    {34, "TQ1_0", 256, 54},
    {35, "TQ2_0", 256, 66},
    {39, "MXFP4", 32, 17, each<mxfp4, 32, 17>},
    {40, "NVFP4", 64, 36},
    {41, "Q1_0", 128, 18},
};

}  // namespace

const GgmlType* find_ggml_type(uint32_t id) {
  for (const GgmlType& type : kTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

std::string readable_ggml_types() {
  std::string names;
  for (const GgmlType& type : kTypes) {
    if (type.dequantize) names += (names.empty() ? "" : ", ") + std::string(type.name);
  }
  return names;
}

}  // namespace coterie
