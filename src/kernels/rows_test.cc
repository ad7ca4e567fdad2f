// Row-wise kernels of every ISA against doubles. u is the unit roundoff of fp32, 2^-24.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/norm.h"
#include "kernels/reference.h"
#include "kernels/rope.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

constexpr double u = kUnitRoundoff;
constexpr int64_t kWidths[] = {1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 100, 257};

// To the nearest integer of a grid whose largest step is 127; what comes back is within half a step.
TEST(Rows, QuantizedRowsComeBackWithinHalfAStep) {
  std::mt19937 random(4);
  for_each_isa([&] {
    for (int64_t n : kWidths) {
      std::vector<float> x = random_floats(n, random, 3.0f);
      std::vector<int8_t> bytes(x.size());
      std::vector<int16_t> wide(x.size());
      const float factor = active_kernels().quantize_row(x.data(), n, bytes.data());
      float largest = 0;
      for (const float value : x) largest = std::max(largest, std::abs(value));
      EXPECT_EQ(factor, largest / 127.0f);
      active_kernels().widen_row(bytes.data(), n, wide.data());
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(wide[i], bytes[i]);
        ASSERT_NEAR(factor * bytes[i], x[i], (0.5 + 2 * 127 * 2 * u) * factor) << "n " << n << " at " << i;
      }
      const float fine = active_kernels().quantize_row_wide(x.data(), n, 32767, wide.data());
      EXPECT_EQ(fine, largest / 32767.0f);
      for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(fine * wide[i], x[i], (0.5 + 2 * 32767 * 2 * u) * fine);
      std::fill(x.begin(), x.end(), 0.0f);
      EXPECT_EQ(active_kernels().quantize_row(x.data(), n, bytes.data()), 0.0f);
      EXPECT_EQ(bytes, std::vector<int8_t>(x.size(), 0));
    }
  });
}

// A sum of D squares has a relative error of at most D u, its square root half of that; the division,
// the root, the two products and the addition of eps add one u each.
TEST(Norm, RmsNormAgreesWithDoubles) {
  std::mt19937 random(1);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (int64_t D : kWidths) {
      const int64_t T = 5;
      const std::vector<float> x = random_floats(T * D, random, 3.0f), weight = random_floats(D, random);
      std::vector<float> out = x;  // in place
      std::vector<double> expected(x.size());
      reference::rms_norm(x.data(), weight.data(), 1e-5f, T, D, expected.data());
      rms_norm(out.data(), weight.data(), 1e-5f, T, D, out.data(), pool);
      for (size_t i = 0; i < out.size(); ++i) {
        const double tolerance = (0.5 * static_cast<double>(D) + 6) * u * std::abs(expected[i]);
        ASSERT_NEAR(out[i], expected[i], tolerance) << "D " << D << " at " << i;
      }
    }
  });
}

// The gradients as the derivative of the double reference, by central differences with step h: their
// error is O(h^2) plus rounding u_double / h, far below the fp32 error of a few D u.
TEST(Norm, RmsNormBackwardAgreesWithDifferences) {
  std::mt19937 random(5);
  NativeThreadPool pool(2);
  constexpr double kStep = 1e-3;
  for_each_isa([&] {
    for (int64_t D : {1, 7, 16, 33}) {
      const int64_t T = 131;  // more rows than a part holds
      const std::vector<float> x = random_floats(T * D, random, 3.0f), weight = random_floats(D, random);
      const std::vector<float> grad = random_floats(T * D, random);
      std::vector<float> grad_x(x.size()), grad_weight(weight.size());
      rms_norm_backward({.x_TD = x.data(),
                         .weight_D = weight.data(),
                         .grad_TD = grad.data(),
                         .eps = 1e-5f,
                         .T = T,
                         .D = D,
                         .grad_x_TD = grad_x.data(),
                         .grad_weight_D = grad_weight.data()},
                        pool);
      const auto value = [&](int64_t t, const std::vector<double>& row) {  // sum of grad * rms_norm of row t
        double squares = 0, sum = 0;
        for (double v : row) squares += v * v;
        for (int64_t i = 0; i < D; ++i) sum += grad[t * D + i] * row[i] * weight[i];
        return sum / std::sqrt(squares / static_cast<double>(D) + 1e-5f);
      };
      std::vector<double> expected_weight(D, 0.0), magnitude(D, 0.0);
      for (int64_t t = 0; t < T; ++t) {
        const std::vector<double> row(x.begin() + t * D, x.begin() + (t + 1) * D);
        double squares = 0;
        for (double v : row) squares += v * v;
        const double scale = 1 / std::sqrt(squares / static_cast<double>(D) + 1e-5f);
        for (int64_t i = 0; i < D; ++i) {
          std::vector<double> above = row, below = row;
          above[i] += kStep;
          below[i] -= kStep;
          const double expected = (value(t, above) - value(t, below)) / (2 * kStep);
          // Both terms of grad_x are at most scale * sum |grad weight|; differences err by h^2 scale^3 of that.
          double bound = 0;
          for (int64_t j = 0; j < D; ++j) bound += std::abs(grad[t * D + j] * weight[j]);
          bound *= scale;
          ASSERT_NEAR(grad_x[t * D + i], expected, bound * ((D + 8) * 2 * u + 4 * kStep * kStep * scale * scale));
          expected_weight[i] += grad[t * D + i] * row[i] * scale;
          magnitude[i] += std::abs(grad[t * D + i] * row[i] * scale);
        }
      }
      for (int64_t i = 0; i < D; ++i) {
        ASSERT_NEAR(grad_weight[i], expected_weight[i], magnitude[i] * (D + T + 8) * u);
      }
    }
  });
}

// With the formula in doubles. A mean of D values has an error of at most (D + 2) u of the mean magnitude; centring by
// it keeps that absolute error, so that with m the largest |x| and d the deviation, n is off by (D + 4) u (m / d + |n|)
// and d by (D + 4) u (1 + m / d) of itself. All terms of grad_x are at most max |g| (1 + |n|^2) / d.
TEST(Norm, LayerNormBackwardAgreesWithDoubles) {
  std::mt19937 random(14);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (int64_t D : {1, 7, 16, 33, 256}) {
      const int64_t T = 131;  // more rows than a part holds
      const std::vector<float> x = random_floats(T * D, random, 3.0f), weight = random_floats(D, random);
      const std::vector<float> grad = random_floats(T * D, random), residual = random_floats(T * D, random);
      std::vector<float> grad_x(x.size()), grad_weight(weight.size()), grad_bias(weight.size());
      layer_norm_backward({.x_TD = x.data(),
                           .weight_D = weight.data(),
                           .grad_TD = grad.data(),
                           .residual_TD = residual.data(),
                           .eps = 0.01f,
                           .T = T,
                           .D = D,
                           .grad_x_TD = grad_x.data(),
                           .grad_weight_D = grad_weight.data(),
                           .grad_bias_D = grad_bias.data()},
                          pool);
      std::vector<double> weights(D, 0.0), weight_errors(D, 0.0), biases(D, 0.0), magnitudes(D, 0.0);
      const double width = static_cast<double>(D), terms = (width + 16) * u;
      for (int64_t t = 0; t < T; ++t) {
        const float *row = x.data() + t * D, *g = grad.data() + t * D;
        double mean = 0, variance = 0, mean_grad = 0, mean_product = 0, largest = 0, largest_grad = 0;
        for (int64_t i = 0; i < D; ++i) mean += row[i] / width;
        for (int64_t i = 0; i < D; ++i) variance += (row[i] - mean) * (row[i] - mean) / width;
        const double deviation = std::sqrt(variance + 0.01f);
        for (int64_t i = 0; i < D; ++i) {
          const double product = double{g[i]} * weight[i];
          mean_grad += product / width;
          mean_product += product * (row[i] - mean) / deviation / width;
          largest = std::max(largest, std::abs(double{row[i]}));
          largest_grad = std::max(largest_grad, std::abs(product));
        }
        const double relative = terms * (1 + largest / deviation);
        for (int64_t i = 0; i < D; ++i) {
          const double n = (row[i] - mean) / deviation;
          const double expected = (double{g[i]} * weight[i] - mean_grad - n * mean_product) / deviation;
          const double bound = 4 * relative * largest_grad * (2 + std::abs(n)) * (1 + largest / deviation) / deviation;
          ASSERT_NEAR(grad_x[t * D + i], expected + residual[t * D + i], bound + 2 * u * std::abs(residual[t * D + i]));
          weights[i] += g[i] * n;
          weight_errors[i] += std::abs(g[i]) * (1 + std::abs(n)) * (relative + T * u);
          biases[i] += g[i];
          magnitudes[i] += std::abs(g[i]);
        }
      }
      for (int64_t i = 0; i < D; ++i) {
        ASSERT_NEAR(grad_weight[i], weights[i], weight_errors[i]);
        ASSERT_NEAR(grad_bias[i], biases[i], T * u * magnitudes[i]);
      }
    }
  });
}

// The mean is off by at most D u mean|x| =: m, which shifts x - mean; the rest is as for RMSNorm, and the
// variance, shifted by at most 2 m mean|x - mean| + m^2, is dominated by eps when D is 1.
TEST(Norm, LayerNormAgreesWithDoubles) {
  std::mt19937 random(2);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (int64_t D : kWidths) {
      const int64_t T = 5;
      const std::vector<float> x = random_floats(T * D, random, 3.0f), weight = random_floats(D, random);
      const std::vector<float> bias = random_floats(D, random);
      for (const float* b : {bias.data(), static_cast<const float*>(nullptr)}) {
        std::vector<float> out(x.size());
        std::vector<double> expected(x.size());
        reference::layer_norm(x.data(), weight.data(), b, 1e-5f, T, D, expected.data());
        layer_norm(x.data(), weight.data(), b, 1e-5f, T, D, out.data(), pool);
        for (size_t i = 0; i < out.size(); ++i) {
          const auto t = static_cast<int64_t>(i) / D;
          double mean = 0, variance = 1e-5, magnitude = 0;
          for (int64_t j = 0; j < D; ++j) mean += x[t * D + j] / static_cast<double>(D);
          for (int64_t j = 0; j < D; ++j) magnitude += std::abs(x[t * D + j]) / static_cast<double>(D);
          for (int64_t j = 0; j < D; ++j) variance += std::pow(x[t * D + j] - mean, 2) / static_cast<double>(D);
          const double shift = (static_cast<double>(D) + 1) * u * magnitude / std::sqrt(variance);
          const double value = std::abs(expected[i]) + std::abs(b ? bias[i % D] : 0.0f);
          const double relative = (0.5 * static_cast<double>(D) + 8) * u + shift;
          ASSERT_NEAR(out[i], expected[i], shift * std::abs(weight[i % D]) + relative * value)
              << "D " << D << " at " << i;
        }
      }
    }
  });
}

// Whole heads and parts of them, in both layouts.
TEST(Rope, AgreesWithDoubles) {
  std::mt19937 random(3);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (int64_t head_dim : {2, 6, 16, 34, 64, 80, 128}) {
      for (const bool interleaved : {false, true}) {
        const int64_t T = 7, num_heads = 3, rotary_dim = interleaved ? head_dim : (head_dim + 2) / 4 * 2;
        const std::vector<int32_t> positions = {0, 1, 2, 100, 4095, 131071, 7};
        std::vector<float> frequency, cosines(T * rotary_dim / 2), sines(cosines);
        for (int64_t i = 0; i < rotary_dim / 2; ++i) {
          frequency.push_back(
              static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim))));
        }
        RopeHeads heads = {.T = T,
                           .token_stride = num_heads * head_dim + 5,
                           .num_heads = num_heads,
                           .head_stride = head_dim,
                           .rotary_dim = rotary_dim,
                           .interleaved = interleaved};
        std::vector<float> x = random_floats(T * heads.token_stride, random), expected = x, magnitude = x;
        for (int64_t t = 0; t < T; ++t) {
          rope_angles(positions[t], frequency.data(), rotary_dim / 2, 1.0f, cosines.data() + t * rotary_dim / 2,
                      sines.data() + t * rotary_dim / 2);
        }
        heads.x = x.data();
        rope(heads, cosines.data(), sines.data(), pool);
        heads.x = expected.data();
        reference::rope(heads, positions.data(), frequency.data());
        // Sine and cosine within 1 ulp, two products, one sum: 4 u of |a| + |b|, at most twice the largest here.
        for (float& value : magnitude) value = std::abs(value);
        const float largest = *std::max_element(magnitude.begin(), magnitude.end());
        for (size_t i = 0; i < x.size(); ++i)
          ASSERT_NEAR(x[i], expected[i], 4 * u * 2 * largest) << head_dim << " at " << i;
      }
    }
  });
}

TEST(Rows, Softmax) {
  std::mt19937 random(4);
  for_each_isa([&] {
    for (int64_t n : kWidths) {
      const std::vector<float> x = random_floats(n, random, 10.0f);
      std::vector<float> out(x.size());
      active_kernels().softmax_row(x.data(), n, out.data());
      double sum = 0;
      for (float value : x) sum += std::exp(double{value});
      for (int64_t i = 0; i < n; ++i) {
        // x - max is rounded: |x - max| u; exp to 2 ulp; a sum of n terms; the quotient.
        const double expected = std::exp(double{x[i]}) / sum, range = 100.0;
        ASSERT_NEAR(out[i], expected, (2 * range + static_cast<double>(n) + 8) * u * expected + 1e-37);
      }
    }
    const float infinity = std::numeric_limits<float>::infinity();
    const float masked[] = {-infinity, 0.0f, -infinity};
    float out[3];
    active_kernels().softmax_row(masked, 3, out);
    EXPECT_EQ(out[0], 0.0f);
    EXPECT_EQ(out[1], 1.0f);
  });
}

// grad_pre = weight * grad * slopes, dot = grad . inner.
TEST(Rows, ActivationBackward) {
  std::mt19937 random(5);
  for_each_isa([&] {
    for (bool gated : {false, true}) {
      for (int64_t F : kWidths) {
        const int64_t U = gated ? 2 * F : F;
        const std::vector<float> slopes = random_floats(U, random), grad = random_floats(F, random);
        const std::vector<float> inner = random_floats(F, random);
        std::vector<float> grad_pre(static_cast<size_t>(U));
        const float dot = active_kernels().activate_backward_row(
            {grad.data(), slopes.data(), inner.data(), grad_pre.data(), DType::kF32, F, 0.7f, gated});
        double expected_dot = 0, absolute = 0;
        for (int64_t i = 0; i < U; ++i) {
          const double expected = double{0.7f} * grad[i % F] * slopes[i];
          ASSERT_NEAR(grad_pre[i], expected, 2 * u * std::abs(expected));
        }
        for (int64_t i = 0; i < F; ++i) {
          expected_dot += double{grad[i]} * inner[i];
          absolute += std::abs(double{grad[i]} * inner[i]);
        }
        ASSERT_NEAR(dot, expected_dot, static_cast<double>(F) * u * absolute);
      }
    }
  });
}

TEST(Rows, ConversionRoundsLikeTheScalarOne) {
  std::vector<float> x = {0.0f,
                          -0.0f,
                          1.0f,
                          1.00390625f,
                          1.01171875f,
                          3.4e38f,
                          1e-40f,
                          std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN(),
                          std::bit_cast<float>(0x7f800001u)};
  std::mt19937 random(6);
  for (int i = 0; i < 1000; ++i) x.push_back(std::bit_cast<float>(static_cast<uint32_t>(random())));
  for_each_isa([&] {
    for (int64_t n : {int64_t{1}, int64_t{7}, int64_t{33}, static_cast<int64_t>(x.size())}) {
      std::vector<BFloat16> out(static_cast<size_t>(n));
      std::vector<float> back(static_cast<size_t>(n));
      active_kernels().convert_row(x.data(), DType::kF32, out.data(), DType::kBF16, n);
      active_kernels().convert_row(out.data(), DType::kBF16, back.data(), DType::kF32, n);
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(out[i].bits, to_bfloat16(x[i]).bits) << x[i];
        ASSERT_EQ(std::bit_cast<uint32_t>(back[i]), uint32_t{out[i].bits} << 16);
      }
    }
  });
}

TEST(Rows, CombineScaleAddAndDot) {
  std::mt19937 random(7);
  for_each_isa([&] {
    const KernelTable& kernels = active_kernels();
    for (int64_t n : kWidths) {
      const std::vector<float> a = random_floats(n, random), b = random_floats(n, random);
      const float* rows[] = {a.data(), b.data()};
      const float weights[] = {0.25f, -1.5f};
      std::vector<float> out(a.size()), sum = a;
      kernels.combine_rows(rows, weights, 2, out.data(), DType::kF32, n);
      const std::vector<BFloat16> halves = rounded(b);
      kernels.add_row(halves.data(), DType::kBF16, sum.data(), n);
      double dot = 0, absolute = 0;
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_NEAR(out[i], 0.25 * a[i] - 1.5 * b[i], 2 * u * (std::abs(a[i]) + 1.5 * std::abs(b[i])));
        ASSERT_EQ(sum[i], a[i] + to_float(halves[i]));
        dot += double{to_float(halves[i])} * a[i];
        absolute += std::abs(double{to_float(halves[i])} * a[i]);
      }
      ASSERT_NEAR(kernels.dot_row(halves.data(), DType::kBF16, a.data(), n), dot,
                  static_cast<double>(n) * u * absolute);
      kernels.combine_rows(nullptr, nullptr, 0, out.data(), DType::kF32, n);
      for (float value : out) ASSERT_EQ(value, 0.0f);
    }
  });
}

TEST(Rows, SquareSum) {
  std::mt19937 random(12);
  for_each_isa([&] {
    for (int64_t n : kWidths) {
      const std::vector<float> x = random_floats(n, random);
      const std::vector<BFloat16> halves = rounded(x);
      double sum = 0, sum_of_halves = 0;
      for (float value : x) sum += double{value} * value;
      for (BFloat16 value : halves) sum_of_halves += double{to_float(value)} * to_float(value);
      const double relative = (static_cast<double>(n) + 2) * u;
      ASSERT_NEAR(active_kernels().square_sum_row(x.data(), DType::kF32, n), sum, relative * sum);
      ASSERT_NEAR(active_kernels().square_sum_row(halves.data(), DType::kBF16, n), sum_of_halves,
                  relative * sum_of_halves);
    }
  });
}

// Of many keys: neighbours alone, a mean within five standard deviations (a neighbour's distance halved at most, over
// the root of the number) of the value; and the same on every ISA.
TEST(Rows, RoundsRandomlyWithoutBias) {
  std::mt19937 random(14);
  const int64_t n = 37;
  const std::vector<float> x = random_floats(n, random);
  constexpr uint32_t kKeys = 4000;
  std::vector<std::vector<double>> sums;
  for_each_isa([&] {
    std::vector<double> sum(static_cast<size_t>(n));
    std::vector<BFloat16> out(static_cast<size_t>(n));
    for (uint32_t key = 0; key < kKeys; ++key) {
      active_kernels().round_randomly_row(x.data(), key, out.data(), n);
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_LT(std::abs(to_float(out[i]) - x[i]), std::abs(x[i]) * 0x1p-7);
        sum[i] += to_float(out[i]);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const double spacing = std::abs(x[i]) * 0x1p-7;
      ASSERT_NEAR(sum[i] / kKeys, x[i], 5 * 0.5 * spacing / std::sqrt(kKeys)) << i;
    }
    sums.push_back(sum);
    const std::vector<BFloat16> exact = rounded(x);
    std::vector<float> floats(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) floats[i] = to_float(exact[i]);
    active_kernels().round_randomly_row(floats.data(), 1, out.data(), n);
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(out[i].bits, exact[i].bits);
  });
  for (const std::vector<double>& sum : sums) EXPECT_EQ(sum, sums[0]);
}

// One element's step in doubles. Errors: a blend of a and b, b + beta (a - b), is off by at most 4 u (|a| + |b|), with
// the two roundings of g and |b| the size of its two parts; of squares by 6 u of their sum, and the root halves that.
// The quotient, its factor and eps add 8 u, the last fma 2 u.
TEST(Rows, AdamWAgreesWithDoubles) {
  AdamWFactors f{.grad_scale = 0.3f,
                 .beta1 = 0.9f,
                 .beta2 = 0.95f,
                 .decay = 0.99f,
                 .step_size = 0.02f,
                 .inverse_root = 1.7f,
                 .eps = 1e-6f};
  std::mt19937 random(13);
  for_each_isa([&] {
    for (int64_t n : kWidths) {
      for (int kind = 0; kind < 4; ++kind) {  // gradients of fp32, of bf16, none; Adam's decay
        f.l2 = kind == 3 ? 0.05f : 0.0f;
        const std::vector<float> grad = random_floats(n, random), w = random_floats(n, random);
        const std::vector<float> m = random_floats(n, random), root_v = random_floats(n, random);
        const std::vector<BFloat16> halves = rounded(grad);
        std::vector<float> master = w, average = m, square = root_v;
        std::vector<BFloat16> parameter(static_cast<size_t>(n));
        for (float& value : square) value *= value;
        const std::vector<float> v = square;
        AdamWRow row{.factors = f,
                     .master = master.data(),
                     .exp_avg = average.data(),
                     .exp_avg_sq = square.data(),
                     .parameter = parameter.data(),
                     .n = n};
        if (kind == 0 || kind == 3) row.grad = grad.data();
        if (kind == 1) row.grad = halves.data();
        if (kind == 1) row.grad_dtype = DType::kBF16;
        active_kernels().adamw_row(row);
        for (int64_t i = 0; i < n; ++i) {
          const double raw = kind == 1 ? to_float(halves[i]) : (kind == 2 ? 0.0 : grad[i]);
          const double scaled = raw * f.grad_scale, decayed = double{f.l2} * w[i], g = scaled + decayed;
          const double size = std::abs(scaled) + std::abs(decayed);
          const double new_m = double{f.beta1} * m[i] + (1.0 - f.beta1) * g;
          const double new_v = double{f.beta2} * v[i] + (1.0 - f.beta2) * g * g;
          const double denominator = f.inverse_root * std::sqrt(new_v) + f.eps,
                       step = f.step_size * new_m / denominator;
          const double m_error = 4 * u * (std::abs(m[i]) + size), v_error = 6 * u * (v[i] + size * size);
          ASSERT_NEAR(average[i], new_m, m_error);
          ASSERT_NEAR(square[i], new_v, v_error);
          const double error = f.step_size * m_error / denominator + std::abs(step) * (v_error / (2 * new_v) + 8 * u) +
                               2 * u * std::abs(w[i]);
          ASSERT_NEAR(master[i], f.decay * double{w[i]} - step, error);
          ASSERT_EQ(parameter[i].bits, to_bfloat16(master[i]).bits);
        }
      }
    }
  });
}

}  // namespace
}  // namespace coterie
