#include "base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "coterie/error.h"

namespace coterie {
namespace {

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

TEST(BFloat16, RoundsToNearestEven) {
  EXPECT_EQ(to_bfloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(to_bfloat16(from_bits(0x3f808000)).bits, 0x3f80);  // a tie goes to the even neighbour, below
  EXPECT_EQ(to_bfloat16(from_bits(0x3f818000)).bits, 0x3f82);  // and above
  EXPECT_EQ(to_bfloat16(from_bits(0x3f808001)).bits, 0x3f81);
  EXPECT_EQ(to_bfloat16(from_bits(0x3f807fff)).bits, 0x3f80);
  EXPECT_EQ(to_bfloat16(-0.0f).bits, 0x8000);
  EXPECT_EQ(to_bfloat16(from_bits(0x7f7fffff)).bits, 0x7f80);  // the largest float rounds to infinity
}

TEST(BFloat16, KeepsSpecialValues) {
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::infinity()).bits, 0x7f80);
  EXPECT_EQ(to_bfloat16(-std::numeric_limits<float>::infinity()).bits, 0xff80);
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(from_bits(0x7f800001)))));  // its payload lies in the lost half
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const BFloat16 value = {static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(value))) {
      ASSERT_EQ(to_bfloat16(to_float(value)).bits, bits);
    }
  }
}

// Every binary16 by its definition.
TEST(Half, AllValues) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double sign = bits >> 15 ? -1.0 : 1.0;
    const float value = half_to_float(static_cast<uint16_t>(bits));
    if (exponent == 31 && mantissa) {
      ASSERT_TRUE(std::isnan(value));
    } else if (exponent == 31) {
      ASSERT_EQ(value, sign * INFINITY);
    } else if (exponent == 0) {
      ASSERT_EQ(value, sign * mantissa / 16777216.0);
      ASSERT_EQ(std::signbit(value), sign < 0);
    } else {
      ASSERT_EQ(value, sign * (1 + mantissa / 1024.0) * std::pow(2.0, exponent - 15));
    }
  }
}

TEST(DType, ConvertsRowsWithoutAlignment) {
  const std::vector<float> values = {0.5f, -2.0f, 3.0f};
  std::vector<char> bytes(1 + 6);
  std::vector<uint16_t> halves(3);
  convert_from_float(values.data(), DType::kBF16, halves.data(), 3);
  std::copy_n(reinterpret_cast<const char*>(halves.data()), 6, bytes.data() + 1);
  std::vector<float> back(3);
  convert_to_float(bytes.data() + 1, DType::kBF16, back.data(), 3);
  EXPECT_EQ(back, values);
  const uint16_t half[] = {0x3800, 0xc000, 0x4200};
  convert_to_float(half, DType::kF16, back.data(), 3);
  EXPECT_EQ(back, values);
  convert_to_float(nullptr, DType::kF32, nullptr, 0);
}

TEST(DType, Names) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI8, DType::kU8, DType::kI32, DType::kI64}) {
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype);
  }
  EXPECT_EQ(dtype_size(DType::kBF16), 2u);
  EXPECT_EQ(dtype_size(DType::kI64), 8u);
  try {
    dtype_from_name("fp8");
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()).find("dtype: 'fp8' is not one of"), 0u);
  }
}

}  // namespace
}  // namespace coterie
