// Causal attention and its gradient, of every ISA, against doubles.
//
// The oracle carries a bound of the rounding error beside each value, by the rules of running error analysis (Higham,
// "Accuracy and Stability of Numerical Algorithms", section 3.3), first order, times 1.02 for the rest. u is the unit
// roundoff of fp32, w that of the operands: a sum of n products is off by at most (n + 2) u of the sum of their
// magnitudes, exp by 8 u, and what is an operand or a result is rounded once more, by w. Operands that are given are
// exact.
#include "kernels/causal_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/test_support.h"

namespace coterie {
namespace {

constexpr double u = kUnitRoundoff;

struct Bounded {
  double value = 0, error = 0;
};

struct Case {
  CausalShape shape;
  DType dtype;

  double w() const { return dtype == DType::kBF16 ? kBf16UnitRoundoff : u; }
};

// A matrix of the case's type, and the same in doubles. Rows are `stride` apart, what lies between them is NaN.
struct Operand {
  int64_t rows, cols, stride;
  DType dtype;
  std::vector<double> values;
  std::vector<float> floats;
  std::vector<BFloat16> halves;

  Operand(int64_t num_rows, int64_t num_cols, DType type, float fill)
      : rows(num_rows), cols(num_cols), stride(num_cols + 3), dtype(type) {
    floats.assign(static_cast<size_t>(rows * stride), std::numeric_limits<float>::quiet_NaN());
    for (int64_t r = 0; r < rows; ++r) std::fill_n(floats.begin() + r * stride, cols, fill);
    halves = rounded(floats);
  }
  Operand(int64_t num_rows, int64_t num_cols, DType type, std::mt19937& random)
      : Operand(num_rows, num_cols, type, 0.0f) {
    const std::vector<float> drawn = random_floats(rows * cols, random);
    for (int64_t i = 0; i < rows * cols; ++i) floats[i / cols * stride + i % cols] = drawn[i];
    halves = rounded(floats);
    for (int64_t i = 0; i < rows * cols; ++i) values.push_back(get(i / cols, i % cols));
  }
  double get(int64_t r, int64_t c) const {
    return dtype == DType::kBF16 ? to_float(halves[r * stride + c]) : floats[r * stride + c];
  }
  Matrix matrix() {
    void* const data = dtype == DType::kBF16 ? static_cast<void*>(halves.data()) : floats.data();
    return {data, dtype, rows, cols, stride};
  }
};

struct Oracle {
  const Case& c;
  const Operand &qkv, &grad_out;
  std::vector<Bounded> out, logsumexp, grad_qkv;

  Oracle(const Case& one, const Operand& x, const Operand& g) : c(one), qkv(x), grad_out(g) {
    const CausalShape& s = c.shape;
    out.resize(static_cast<size_t>(s.num_tokens() * s.H * s.d));
    logsumexp.resize(static_cast<size_t>(s.num_tokens() * s.H));
    grad_qkv.resize(static_cast<size_t>(s.num_tokens() * s.columns()));
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t h = 0; h < s.H; ++h) {
        for (int64_t i = 0; i < s.S; ++i) query(b, h, i);
      }
    }
    for (Bounded& x : grad_qkv) x.error += c.w() * std::abs(x.value);
  }

  void query(int64_t b, int64_t h, int64_t i) {
    const CausalShape& s = c.shape;
    const int64_t g = h / (s.H / s.G), t = b * s.S + i, first_key = b * s.S;
    const int64_t q0 = h * s.d, k0 = (s.H + g) * s.d, v0 = (s.H + s.G + g) * s.d;
    const double scale = 1.0 / std::sqrt(static_cast<double>(s.d)), dot_error = (static_cast<double>(s.d) + 4) * u;
    const double sum_error = static_cast<double>(s.S) * static_cast<double>(s.H / s.G) * u + 2 * u;
    const auto x = [&](int64_t row, int64_t col) { return qkv.values[row * qkv.cols + col]; };
    const auto grad = [&](int64_t col) { return grad_out.values[t * grad_out.cols + h * s.d + col]; };
    std::vector<Bounded> score(i + 1), p(i + 1), grad_p(i + 1);
    double maximum = -INFINITY, score_error = 0, sum = 0;
    for (int64_t j = 0; j <= i; ++j) {
      for (int64_t e = 0; e < s.d; ++e) {
        const double product = scale * x(t, q0 + e) * x(first_key + j, k0 + e);
        score[j] = {score[j].value + product, score[j].error + dot_error * std::abs(product)};
        grad_p[j].value += grad(e) * x(first_key + j, v0 + e);
        grad_p[j].error += dot_error * std::abs(grad(e) * x(first_key + j, v0 + e));
      }
      maximum = std::max(maximum, score[j].value);
      score_error = std::max(score_error, score[j].error + 2 * u * std::abs(score[j].value));
    }
    for (const Bounded& z : score) sum += std::exp(z.value - maximum);
    // Its own error, that of the sum, which has those of all scores, and differences of rounded numbers.
    const double log_sum = maximum + std::log(sum);
    const double log_error = score_error + (static_cast<double>(s.S) + 16) * u + 2 * u * std::abs(log_sum);
    logsumexp[(b * s.H + h) * s.S + i] = {log_sum, log_error};
    double delta = 0, delta_error = 0;
    for (int64_t j = 0; j <= i; ++j) {
      p[j].value = std::exp(score[j].value - log_sum);
      p[j].error = p[j].value * (score_error + log_error + 10 * u) + 1e-37;
    }
    for (int64_t j = 0; j <= i; ++j) {  // of the weights before they are rounded
      delta += p[j].value * grad_p[j].value;
      delta_error += p[j].error * std::abs(grad_p[j].value) + p[j].value * grad_p[j].error +
                     (static_cast<double>(i) + 3) * u * p[j].value * std::abs(grad_p[j].value);
    }
    for (Bounded& weight : p) weight.error += c.w() * weight.value;
    for (int64_t e = 0; e < s.d; ++e) {
      Bounded& o = out[(t * s.H + h) * s.d + e];
      for (int64_t j = 0; j <= i; ++j) {
        const double v = x(first_key + j, v0 + e);
        o = {o.value + p[j].value * v, o.error + std::abs(v) * (p[j].error + p[j].value * sum_error)};
      }
      o.error += (c.w() + 2 * u) * std::abs(o.value);
    }
    for (int64_t j = 0; j <= i; ++j) {
      const double difference = grad_p[j].value - delta, ds = p[j].value * difference * scale;
      const double ds_error =
          scale * (p[j].error * std::abs(difference) + p[j].value * (grad_p[j].error + delta_error)) +
          (c.w() + 4 * u) * std::abs(ds) + 1e-37;
      for (int64_t e = 0; e < s.d; ++e) {
        const auto add = [&](int64_t row, int64_t col, const Bounded& a, double operand) {
          Bounded& sum = grad_qkv[row * s.columns() + col];
          sum.value += a.value * operand;
          sum.error += std::abs(operand) * (a.error + sum_error * std::abs(a.value));
        };
        add(t, q0 + e, {ds, ds_error}, x(first_key + j, k0 + e));
        add(first_key + j, k0 + e, {ds, ds_error}, x(t, q0 + e));
        add(first_key + j, v0 + e, p[j], grad(e));
      }
    }
  }
};

void expect_within(const std::vector<Bounded>& expected, const Operand& actual, const char* what) {
  for (int64_t i = 0; i < static_cast<int64_t>(expected.size()); ++i) {
    const Bounded& e = expected[i];
    ASSERT_NEAR(actual.get(i / actual.cols, i % actual.cols), e.value, 1.02 * e.error) << what << " at " << i;
  }
}

struct Results {
  Operand out, grad;
  std::vector<float> logsumexp;

  Results(const Case& c, Operand& qkv, Operand& grad_out, ThreadPool& pool)
      : out(c.shape.num_tokens(), c.shape.H * c.shape.d, c.dtype, NAN),
        grad(c.shape.num_tokens(), c.shape.columns(), c.dtype, NAN),
        logsumexp(static_cast<size_t>(c.shape.num_tokens() * c.shape.H)) {
    causal_attention(c.shape, qkv.matrix(), out.matrix(), logsumexp.data(), pool);
    causal_attention_backward(c.shape, qkv.matrix(), logsumexp.data(), grad_out.matrix(), grad.matrix(), pool);
  }
};

constexpr CausalShape kShapes[] = {
    {.B = 1, .S = 1, .H = 1, .G = 1, .d = 4},   {.B = 3, .S = 7, .H = 4, .G = 2, .d = 5},
    {.B = 2, .S = 33, .H = 2, .G = 2, .d = 16}, {.B = 1, .S = 64, .H = 3, .G = 1, .d = 64},
    {.B = 1, .S = 301, .H = 2, .G = 1, .d = 8}, {.B = 1, .S = 513, .H = 1, .G = 1, .d = 40},
};

TEST(CausalAttention, AgreesWithDoubles) {
  NativeThreadPool pool(2);
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (const CausalShape& shape : kShapes) {
      SCOPED_TRACE("S " + std::to_string(shape.S) + (dtype == DType::kBF16 ? " bf16" : " fp32"));
      std::mt19937 random(5);
      const Case c{shape, dtype};
      Operand qkv(shape.num_tokens(), shape.columns(), dtype, random);
      Operand grad_out(shape.num_tokens(), shape.H * shape.d, dtype, random);
      const Oracle oracle(c, qkv, grad_out);
      for_each_isa([&] {
        const Results results(c, qkv, grad_out, pool);
        expect_within(oracle.out, results.out, "out");
        expect_within(oracle.grad_qkv, results.grad, "gradient");
        for (size_t i = 0; i < oracle.logsumexp.size(); ++i) {
          ASSERT_NEAR(results.logsumexp[i], oracle.logsumexp[i].value, 1.02 * oracle.logsumexp[i].error) << i;
        }
      });
    }
  }
}

// A sequence has the same bits alone and among others, on one thread and on three.
TEST(CausalAttention, BitsDependOnTheSequenceAlone) {
  NativeThreadPool one(1), three(3);
  const Case both{{.B = 2, .S = 45, .H = 4, .G = 2, .d = 24}, DType::kBF16};
  Case last = both;
  last.shape.B = 1;
  std::mt19937 random(6);
  Operand qkv(90, both.shape.columns(), DType::kBF16, random), grad_out(90, 96, DType::kBF16, random);
  for_each_isa([&] {
    const Results together(both, qkv, grad_out, three);
    Operand qkv_last = qkv, grad_last = grad_out;
    for (Operand* x : {&qkv_last, &grad_last}) {
      x->rows = 45;
      x->halves.erase(x->halves.begin(), x->halves.begin() + 45 * x->stride);
    }
    const Results alone(last, qkv_last, grad_last, one);
    for (int64_t t = 0; t < 45; ++t) {
      for (int64_t i = 0; i < 96; ++i) ASSERT_EQ(alone.out.get(t, i), together.out.get(45 + t, i));
      for (int64_t i = 0; i < qkv.cols; ++i) ASSERT_EQ(alone.grad.get(t, i), together.grad.get(45 + t, i));
    }
  });
}

// Scores of a thousand don't overflow, be they of either sign or all far below zero, and what a query does not see does
// not matter.
TEST(CausalAttention, ExtremeScoresStayFinite) {
  NativeThreadPool pool(1);
  for (bool all_below : {false, true}) {
    SCOPED_TRACE(all_below ? "all below zero" : "of either sign");
    const Case c{{.B = 1, .S = 40, .H = 1, .G = 1, .d = 16}, DType::kF32};
    std::mt19937 random(7);
    Operand qkv(40, 48, c.dtype, random), grad_out(40, 16, c.dtype, random);
    for (int64_t t = 0; t < 40; ++t) {
      for (int64_t i = 0; i < 32; ++i) {
        float& x = qkv.floats[t * qkv.stride + i];
        x = 30.0f * (all_below ? std::copysign(x, i < 16 ? 1.0f : -1.0f) : x);
      }
    }
    for_each_isa([&] {
      const Results results(c, qkv, grad_out, pool);
      for (int64_t i = 0; i < 16; ++i) ASSERT_EQ(results.out.get(0, i), qkv.get(0, 32 + i));
      for (int64_t t = 0; t < 40; ++t) {
        for (int64_t i = 0; i < 48; ++i) ASSERT_TRUE(std::isfinite(results.grad.get(t, i))) << t << " " << i;
      }
    });
  }
}

}  // namespace
}  // namespace coterie
