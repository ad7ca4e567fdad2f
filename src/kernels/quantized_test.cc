// Products with quantized weights against obvious loops over the same codes, on every ISA that this CPU runs.
//
// Tolerance: codes are multiplied and summed up exactly. A group's dot, scale_a scale_b dot and minimum scale_a sum are
// rounded on their way into a sum in fp32: at most six roundings a group (u = 2^-24), each at most u times the sum of
// all magnitudes S.
#include "kernels/quantized.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/kernel_table.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

constexpr PanelType kTypes[] = {PanelType::kInt8, PanelType::kInt8A16, PanelType::kInt4Group64, PanelType::kInt4,
                                PanelType::kMxfp4};

// Random codes of any type: what rounding makes of random weights, or for kMxfp4 any codes with any scales.
QuantizedMatrix random_weights(PanelType type, int64_t rows, int64_t cols, std::mt19937& random, ThreadPool& pool) {
  if (type != PanelType::kMxfp4) {
    std::vector<float> values = random_floats(rows * cols, random);
    return QuantizedMatrix(row_major(values.data(), rows, cols), type, pool);
  }
  QuantizedMatrix m(type, rows, cols);
  for (int64_t i = 0; i < rows * m.view().row_words(); ++i) m.codes()[i] = static_cast<uint32_t>(random());
  for (int64_t i = 0; i < rows * m.view().groups(); ++i) {
    m.scales()[i] = to_bfloat16(std::ldexp(1.0f, static_cast<int>(random() % 7) - 3));
  }
  return m;
}

// An element of A as a product with `type` sees it: rounded with the scale of its group of the row.
std::vector<double> rounded_row(const float* row, int64_t K, PanelType type) {
  const int64_t group = quantized_format(type).group;
  const float largest = quantized_format(type).parts == 2 ? 127.0f * 256.0f : 127.0f;
  std::vector<double> rounded;
  for (int64_t first = 0; first < K; first += group) {
    const int64_t end = std::min(K, first + group);
    float most = 0;
    for (int64_t k = first; k < end; ++k) most = std::max(most, std::abs(row[k]));
    for (int64_t k = first; k < end; ++k) {
      const float inverse = most == 0 ? 0.0f : largest / most;
      rounded.push_back(std::nearbyint(row[k] * inverse) * static_cast<double>(most / largest));
    }
  }
  return rounded;
}

struct Sum {
  double value = 0, absolute = 0;
};
Sum product(const std::vector<double>& a, const QuantizedView& b, int64_t n) {
  const QuantizedFormat format = quantized_format(b.type);
  Sum sum;
  for (int64_t k = 0; k < b.cols; ++k) {
    const double element = b.element(n, k);
    sum.value += a[k] * element;
    // What is added up is codes: those of kInt8 and kMxfp4 have an offset, which is exact; minimums are added apart.
    const double minimum = format.stored_minimum ? b.minimum(n, k / format.group) : 0.0f;
    sum.absolute += std::abs(a[k]) * (std::abs(element - minimum) + std::abs(minimum));
  }
  return sum;
}

// Rows that are quantized beforehand give the same bits.
void expect_same_of_quantized_rows(GemmProblem problem, PanelType type, ThreadPool& pool) {
  const int64_t size = problem.c.rows * problem.c.cols;
  std::vector<uint32_t> rows(static_cast<size_t>(problem.a.rows * a_row_units(type, problem.a.cols)) + 1);
  quantize_rows(problem.a, type, rows.data(), pool);
  const auto* const expected = static_cast<const float*>(problem.c.data);
  std::vector<float> out(static_cast<size_t>(size) + 1);
  problem.a.data = nullptr;
  problem.quantized_a = rows.data();
  problem.c.data = out.data();
  gemm(problem, pool);
  for (int64_t i = 0; i < size; ++i) ASSERT_EQ(out[i], expected[i]) << i;
}

struct Case {
  PanelType type;
  int64_t M, N, K;
  bool gated = false, gather = false, bf16 = false;
};

void check(const Case& c, ThreadPool& pool) {
  SCOPED_TRACE("type " + std::to_string(index_of(c.type)) + " M" + std::to_string(c.M) + " N" + std::to_string(c.N) +
               " K" + std::to_string(c.K) + (c.gated ? " gated" : "") + (c.bf16 ? " bf16" : ""));
  std::mt19937 random(7);
  const int64_t rows = c.gated ? 2 * c.N : c.N, source_rows = c.gather ? 2 * c.M + 1 : c.M;
  const QuantizedMatrix b = random_weights(c.type, rows, c.K, random, pool);
  std::vector<float> a = random_floats(source_rows * c.K + 1, random), out(c.M * c.N + 1),
                     bias = random_floats(rows, random);
  std::vector<BFloat16> a_bf16(a.size());
  convert_from_float(a.data(), DType::kBF16, a_bf16.data(), a.size());
  if (c.bf16) convert_to_float(a_bf16.data(), DType::kBF16, a.data(), a.size());
  std::vector<int32_t> gather;
  for (int64_t m = 0; m < c.M; ++m) gather.push_back(c.gather ? static_cast<int32_t>(random() % source_rows) : m);
  const PackedMatrix packed(b.view(), pool, c.gated);
  GemmProblem problem = {.packed_b = &packed, .c = row_major(out.data(), c.M, c.N), .bias_N = bias.data()};
  problem.a = c.bf16 ? row_major(a_bf16.data(), DType::kBF16, source_rows, c.K) : row_major(a.data(), source_rows, c.K);
  if (c.gather) problem.gather_M = gather.data(), problem.num_gathered = c.M;
  problem.gated = c.gated;
  problem.activation = c.gated ? Activation::kRelu : Activation::kNone;
  gemm(problem, pool);
  expect_same_of_quantized_rows(problem, c.type, pool);
  const double u = kUnitRoundoff, steps = 6.0 * static_cast<double>(groups_of(c.type, c.K)) + 2;
  for (int64_t m = 0; m < c.M; ++m) {
    const std::vector<double> row = rounded_row(a.data() + gather[m] * c.K, c.K, c.type);
    for (int64_t n = 0; n < c.N; ++n) {
      const Sum sum = product(row, b.view(), n);
      double value = sum.value + bias[n], tolerance = steps * u * (sum.absolute + std::abs(bias[n]));
      if (c.gated) {
        const Sum up = product(row, b.view(), c.N + n);
        const double up_value = up.value + bias[c.N + n], gate = std::max(value, 0.0);
        tolerance = tolerance * std::abs(up_value) + gate * steps * u * (up.absolute + std::abs(bias[c.N + n])) +
                    2 * u * std::abs(gate * up_value) + tolerance * steps * u * up.absolute;
        value = gate * up_value;
      }
      ASSERT_NEAR(out[m * c.N + n], value, tolerance + 1e-30) << m << ", " << n;
    }
  }
}

TEST(Quantized, ProductsOfAllTypesAndShapes) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (PanelType type : kTypes) {
      for (int64_t M : {0, 1, 2, 3, 5, 8, 9, 12, 13, 27}) {
        for (int64_t N : {0, 1, 17, 33}) {
          for (int64_t K : {1, 7, 8, 31, 33, 64, 129, 200}) check({.type = type, .M = M, .N = N, .K = K}, pool);
        }
      }
      check({.type = type, .M = 6, .N = 40, .K = 1024}, pool);
      for (int bits = 0; bits < 8; ++bits) {
        check({.type = type,
               .M = 11,
               .N = 37,
               .K = 150,
               .gated = bool(bits & 1),
               .gather = bool(bits & 2),
               .bf16 = bool(bits & 4)},
              pool);
      }
    }
  });
}

TEST(Quantized, RowsHaveTheSameBitsAloneAndInABatch) {
  NativeThreadPool one(1), three(3);
  for_each_isa([&] {
    for (PanelType type : kTypes) {
      std::mt19937 random(3);
      const int64_t M = 50, N = 70, K = 300;
      const QuantizedMatrix b = random_weights(type, N, K, random, one);
      const PackedMatrix packed(b.view(), three);
      const std::vector<float> a = random_floats(M * K, random);
      std::vector<float> batch(M * N), alone(N);
      gemm({.a = row_major(a.data(), M, K), .packed_b = &packed, .c = row_major(batch.data(), M, N)}, three);
      for (int64_t m = 0; m < M; ++m) {
        gemm({.a = row_major(a.data() + m * K, 1, K), .packed_b = &packed, .c = row_major(alone.data(), 1, N)}, one);
        ASSERT_EQ(std::memcmp(alone.data(), batch.data() + m * N, N * sizeof(float)), 0) << "row " << m;
      }
    }
  });
}

// int8: every element is off by half a step at most, and a step is the largest magnitude of the group / 127, rounded up
// to bf16.
TEST(Quantized, Int8RoundsToTheNearestCode) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    std::mt19937 random(1);
    const int64_t rows = 5, K = 300, group = quantized_format(PanelType::kInt8).group;
    std::vector<float> values = random_floats(rows * K, random);
    std::fill(values.begin(), values.begin() + group, 0.0f);
    const QuantizedMatrix m(row_major(values.data(), rows, K), PanelType::kInt8, pool);
    for (int64_t i = 0; i < rows * K; ++i) {
      const double step = m.view().scale(i / K, i % K / group);
      ASSERT_NEAR(m.view().element(i / K, i % K), values[i], step / 2 * (1 + 4 * kUnitRoundoff) + 1e-30);
    }
  });
}

// int4: the squared error is below that of 15 even steps between the extremes; numbers that 16 levels hold are off by
// no more than codes of scale and minimum are, 15 and kMinimumUnit halves of the row's factor.
TEST(Quantized, Int4IsBetterThanEvenStepsBetweenTheExtremes) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (PanelType type : {PanelType::kInt4Group64, PanelType::kInt4}) {
      std::mt19937 random(1);
      const int64_t K = 1000, group = quantized_format(type).group;
      std::vector<float> values = random_floats(K, random);
      const QuantizedMatrix m(row_major(values.data(), 1, K), type, pool);
      double error = 0, even = 0;
      for (int64_t first = 0; first < K; first += group) {
        const auto begin = values.begin() + first, end = values.begin() + std::min(K, first + group);
        const double low = *std::min_element(begin, end), step = (*std::max_element(begin, end) - low) / 15;
        for (auto v = begin; v != end; ++v) {
          error += std::pow(m.view().element(0, v - values.begin()) - *v, 2);
          even += std::pow(std::nearbyint((*v - low) / step) * step + low - *v, 2);
        }
      }
      EXPECT_LT(error, 0.97 * even);
      for (int64_t k = 0; k < K; ++k) {  // every group has both extremes
        const int64_t level = k % group < 2 ? k % group * 15 : static_cast<int64_t>(random() % 16);
        values[k] = static_cast<float>(level) * 0.5f - 2.0f;
      }
      const QuantizedMatrix exact(row_major(values.data(), 1, K), type, pool);
      const double unit = exact.view().row_factors[0];
      EXPECT_LE(unit, 0.51 / 255);
      for (int64_t k = 0; k < K; ++k) {
        ASSERT_NEAR(exact.view().element(0, k), values[k], (15 + kMinimumUnit) / 2.0 * unit) << k;
      }
    }
  });
}

}  // namespace
}  // namespace coterie
