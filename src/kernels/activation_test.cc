// Activations and their derivatives as products apply them, on every ISA, against doubles: products with 1, whose sums
// are the other operand. u is the unit roundoff of fp32.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "coterie/error.h"
#include "kernels/gemm.h"
#include "kernels/reference.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

constexpr double u = kUnitRoundoff;
constexpr Activation kActivations[] = {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
                                       Activation::kSilu};

struct Applied {
  std::vector<float> out, slopes;
};

// activation(x), or activation(x) * up.
Applied run(Activation activation, const std::vector<float>& x, const std::vector<float>& up = {}) {
  NativeThreadPool pool(1);
  const bool gated = !up.empty();
  const auto n = static_cast<int64_t>(x.size());
  std::vector<float> sums = x;
  sums.insert(sums.end(), up.begin(), up.end());
  Applied applied = {std::vector<float>(x.size()), std::vector<float>(sums.size())};
  const float one = 1.0f;
  GemmProblem problem;
  problem.a = row_major(&one, 1, 1);
  problem.b = row_major(sums.data(), static_cast<int64_t>(sums.size()), 1);
  problem.c = row_major(applied.out.data(), 1, n);
  problem.slopes = row_major(applied.slopes.data(), 1, static_cast<int64_t>(sums.size()));
  problem.activation = activation;
  problem.gated = gated;
  gemm(problem, pool);
  return applied;
}

// The argument t of the exponential is rounded, which costs |t| u relative; the polynomials and the few
// operations around them cost at most 16 u.
double exponent(Activation activation, double x) {
  if (activation == Activation::kGelu) return x * x;
  if (activation == Activation::kGeluTanh) return 4 * std::abs(1.6 * x * (1 + 0.044715 * x * x));
  return 0;
}

// A derivative is a sum of two terms, each at most 1 + |x| slope with slope at most 2 (1 + 3 * 0.045 x^2) where it
// still varies; errors as above.
double slope_tolerance(Activation activation, double x) {
  const double terms = 1 + std::abs(x) * 2 * (1 + 0.135 * x * x);
  return (24 + std::min(exponent(activation, x), 200.0)) * u * terms;
}

TEST(Activation, OverTheWholeRange) {
  std::vector<float> x;
  for (float v = -40.0f; v <= 40.0f; v += 0.00317f) x.push_back(v);
  for (float v = 1e-30f; v < 1e30f; v *= 7.3f) x.insert(x.end(), {v, -v});
  x.insert(x.end(), {0.0f, -0.0f});
  for_each_isa([&] {
    for (Activation activation : kActivations) {
      const Applied applied = run(activation, x);
      for (size_t i = 0; i < x.size(); ++i) {
        const double expected = reference::activation_value(activation, x[i]);
        // Below 1e-36 results may be flushed to zero, as may the exponential times x.
        const double tolerance = (16 + std::min(exponent(activation, x[i]), 200.0)) * u * std::abs(expected) + 1e-35;
        ASSERT_NEAR(applied.out[i], expected, tolerance) << activation_name(activation) << "(" << x[i] << ")";
        if (std::abs(x[i]) > 12) continue;
        ASSERT_NEAR(applied.slopes[i], reference::activation_derivative(activation, x[i]),
                    slope_tolerance(activation, x[i]))
            << activation_name(activation) << "'(" << x[i] << ")";
      }
    }
  });
}

TEST(Activation, FarAwaySlopesAreZeroAndOne) {
  for_each_isa([&] {
    for (Activation activation : kActivations) {
      if (activation == Activation::kNone) continue;
      const Applied applied = run(activation, {-1e30f, -100.0f, 100.0f, 1e30f});
      EXPECT_NEAR(applied.slopes[0], 0.0f, 1e-35f) << activation_name(activation);
      EXPECT_NEAR(applied.slopes[1], 0.0f, 1e-35f) << activation_name(activation);
      EXPECT_EQ(applied.slopes[2], 1.0f) << activation_name(activation);
      EXPECT_EQ(applied.slopes[3], 1.0f) << activation_name(activation);
    }
  });
}

TEST(Activation, SlopesOfGateAndUp) {
  std::mt19937 random(5);
  for_each_isa([&] {
    for (Activation activation : kActivations) {
      for (int64_t F : {1, 7, 16, 33, 100}) {
        const std::vector<float> gate = random_floats(F, random, 3.0f), up = random_floats(F, random);
        const Applied applied = run(activation, gate, up);
        for (int64_t i = 0; i < F; ++i) {
          const double tolerance = slope_tolerance(activation, gate[i]);
          ASSERT_NEAR(applied.slopes[i], up[i] * reference::activation_derivative(activation, gate[i]),
                      tolerance * std::abs(up[i]));
          ASSERT_NEAR(applied.slopes[F + i], reference::activation_value(activation, gate[i]),
                      tolerance * std::abs(gate[i]) + 1e-35);
        }
      }
    }
  });
}

TEST(Activation, NanPassesThrough) {
  for_each_isa([&] {
    for (Activation activation : kActivations) {
      EXPECT_TRUE(std::isnan(run(activation, {std::numeric_limits<float>::quiet_NaN()}).out[0]))
          << activation_name(activation);
    }
  });
}

TEST(Activation, NamesOfHuggingFace) {
  EXPECT_EQ(activation_from_name("gelu_new"), Activation::kGeluTanh);
  EXPECT_EQ(activation_from_name("swish"), Activation::kSilu);
  for (Activation activation :
       {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu, Activation::kClampedSwiglu}) {
    EXPECT_EQ(activation_from_name(activation_name(activation)), activation);
  }
  try {
    activation_from_name("mish");
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(
        error.what(),
        "activation: 'mish' is not one of relu, gelu, gelu_new, gelu_pytorch_tanh, silu, swish, clamped_swiglu");
  }
}

}  // namespace
}  // namespace coterie
