// Compact panels hold what the plain ones hold, bit by bit, and products with them have the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/kernel_table.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

BFloat16 from_bits(uint32_t bits) { return to_bfloat16(__builtin_bit_cast(float, bits << 16)); }

// Weights as they are: normal, with zeros and denormals, and rows of very different sizes.
std::vector<BFloat16> weights(int64_t rows, int64_t cols, std::mt19937& random) {
  std::vector<BFloat16> values = rounded(random_floats(rows * cols, random, 0.02f));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      BFloat16& value = values[r * cols + c];
      if (r % 7 == 3) value = to_bfloat16(1e-3f * to_float(value));
      if (r % 11 == 5) value = to_bfloat16(0.0f);  // all of them, or few
      if ((37 * r + c) % 1511 == 0) value = to_bfloat16(-0.0f);
      if ((41 * r + c) % 1531 == 0) value = from_bits(1 + c % 127);
    }
  }
  return values;
}

// A panel's elements as they are said to be packed, in units [K / 2][columns].
std::vector<uint16_t> elements(const void* panel, int64_t K, int64_t columns) {
  std::vector<uint16_t> result;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < columns; ++c) {
      uint16_t element;
      std::memcpy(&element, static_cast<const char*>(panel) + (k / 2 * columns + c) * 4 + k % 2 * 2, 2);
      result.push_back(element);
    }
  }
  return result;
}

// A plain panel of a compact one, byte by byte as CompactPanel says that they lie.
std::vector<uint16_t> expanded(const CompactPanel& shape, const uint32_t* compact) {
  const int64_t row = 2 * shape.columns;  // elements of a unit
  const auto* const bases = reinterpret_cast<const uint8_t*>(compact);
  std::vector<uint16_t> panel(static_cast<size_t>(shape.units() * row));
  for (int64_t u = 0; u < shape.units(); ++u) {
    const auto* const pair =
        reinterpret_cast<const uint8_t*>(compact + shape.codes() + u / 2 * 2 * shape.codes_of_unit());
    for (int64_t i = 0; i < row; ++i) {
      const int64_t place = i / 16 * 8 + i % 16 / 8 * shape.columns + i % 8;
      const int code = u % 2 == 0 ? pair[2 * row + i] & 15 : pair[2 * row + i] >> 4;
      const int sign = code / 8, exponent = bases[i] + code % 8;
      panel[u * row + place] = static_cast<uint16_t>(sign << 15 | exponent << 8 | pair[u % 2 * row + i]);
    }
  }
  const auto* const begins = reinterpret_cast<const uint16_t*>(compact + shape.begins());
  for (int64_t chunk = 0; chunk < shape.chunks(); ++chunk) {
    for (int64_t i = begins[chunk]; i < begins[chunk + 1]; ++i) {
      const uint32_t patch = compact[shape.patches() + i];
      panel[chunk * kChunkUnits * row + (patch & 0xffffu)] = static_cast<uint16_t>(patch >> 16);
    }
  }
  return panel;
}

// The panel of `columns` rows of weights, compact and expanded again.
void check_panel(const std::vector<BFloat16>& values, int64_t K, ThreadPool& pool) {
  const CompactPanel shape = {K, active_kernels().panel_columns()};
  const PackedMatrix plain(row_major(values.data(), DType::kBF16, shape.columns, K), pool);
  const std::optional<PackedMatrix> compact = plain.compacted(pool);
  ASSERT_TRUE(compact);
  ASSERT_EQ(compact->bytes(), static_cast<size_t>(shape.size()) * 4);
  const std::vector<uint16_t> found = expanded(shape, static_cast<const uint32_t*>(compact->data()));
  ASSERT_EQ(elements(found.data(), K, shape.columns), elements(plain.data(), K, shape.columns));
}

TEST(Compact, PanelsAreWhatTheyWere) {
  std::mt19937 random(1);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (int64_t K : {1, 2, 31, 33, 64, 255, 256, 257, 600, 1024}) {
      SCOPED_TRACE(K);
      std::vector<BFloat16> values = weights(active_kernels().panel_columns(), K, random);
      values[0] = to_bfloat16(1e-12f);  // a patch, in the first chunk and in the last
      values[K - 1] = to_bfloat16(-1e-13f);
      check_panel(values, K, pool);
    }
  });
}

TEST(Compact, TakesTwelveBits) {
  const CompactPanel shape = {1024, 32};
  EXPECT_LT(static_cast<double>(32 * shape.size()) / static_cast<double>(shape.K * shape.columns), 12.15);
}

TEST(Compact, EveryExponentAndSpecialValue) {
  NativeThreadPool pool(1);
  for_each_isa([&] {
    // Any 15 exponents that follow each other, up to infinity and NaN.
    for (uint32_t largest = 0; largest < 256; ++largest) {
      SCOPED_TRACE(largest);
      const int64_t K = 30;
      std::vector<BFloat16> values;
      for (int64_t i = 0; i < active_kernels().panel_columns() * K; ++i) {
        const uint32_t exponent = largest - std::min<uint32_t>(largest, i % K % 15);
        const auto bits = static_cast<uint16_t>(i / 3 % 2 * 0x8000 + exponent * 128 + i * 37 % 128);
        std::memcpy(&values.emplace_back(), &bits, 2);
      }
      check_panel(values, K, pool);
    }
  });
}

TEST(Compact, TooManySmallWeightsStayAsTheyAre) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    const int64_t columns = active_kernels().panel_columns(), rows = 3 * columns, K = 300;
    for (int64_t small : {36, 37}) {  // ten chunks have 36 places
      std::vector<BFloat16> values(static_cast<size_t>(rows * K), to_bfloat16(1.0f));
      for (int64_t i = 0; i < small; ++i) values[(columns + i % columns) * K + i] = to_bfloat16(1e-9f);
      const PackedMatrix plain(row_major(values.data(), DType::kBF16, rows, K), pool);
      EXPECT_EQ(plain.compacted(pool).has_value(), small == 36);
    }
    const std::vector<float> floats(static_cast<size_t>(columns * K), 1.0f);
    EXPECT_FALSE(PackedMatrix(row_major(floats.data(), columns, K), pool).compacted(pool));
  });
}

TEST(Compact, ProductsHaveTheSameBits) {
  std::mt19937 random(3);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (bool gated : {false, true}) {
      for (int64_t M : {0, 1, 2, 7, 12, 13, 32, 33, 70, 400}) {
        for (int64_t N : {1, 37, 300}) {
          for (int64_t K : {0, 1, 30, 257, 520}) {
            const int64_t rows = gated ? 2 * N : N;
            const std::vector<BFloat16> a = rounded(random_floats(M * K, random)), b = weights(rows, K, random);
            const PackedMatrix plain(row_major(b.data(), DType::kBF16, rows, K), pool, gated);
            const std::optional<PackedMatrix> compact = plain.compacted(pool);
            ASSERT_TRUE(compact);
            std::vector<float> expected(static_cast<size_t>(M * N), 1.0f), found(expected);
            GemmProblem problem = {.a = row_major(a.data(), DType::kBF16, M, K), .packed_b = &plain, .gated = gated};
            problem.c = row_major(expected.data(), M, N);
            gemm(problem, pool);
            problem.packed_b = &*compact;
            problem.c = row_major(found.data(), M, N);
            gemm(problem, pool);
            ASSERT_EQ(std::memcmp(expected.data(), found.data(), expected.size() * 4), 0)
                << gated << " M " << M << " N " << N << " K " << K;
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace coterie
