// Experts forward and backward against an obvious version in doubles, on every ISA.
//
// Tolerance: the obvious version runs a second time on absolute values, with the activation replaced by
// the identity (|f(x)| <= |x|) and its derivative by 1.13 + 0.8 |x| (|f'| <= 1.13, |f''| <= 0.8 for ReLU,
// GELU and SiLU). Every quantity of that run bounds the sum of absolute terms of the same quantity in the
// real run, so a relative error e made in each of n places moves a result by at most about n e times its
// bound. fp32: the products sum D, F, U, D or R terms, with 40 single operations beside them; bf16: up to
// 12 roundings of intermediate results and operands, 2^-9 each.
#include "moe/experts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "kernels/quantized.h"
#include "kernels/reference.h"
#include "kernels/test_support.h"
#include "moe/router.h"

namespace coterie {
namespace {

using Doubles = std::vector<double>;

// What goes in, as doubles of the values that the kernels see.
struct Inputs {
  Doubles x_TD, up_EUD, down_EDF, up_bias_EU, down_bias_ED, grad_out_TD;
};
struct Results {
  Doubles out_TD, grad_x_TD, grad_up_EUD, grad_down_EDF, grad_up_bias_EU, grad_down_bias_ED, grad_weight_R;
};
using Function = std::function<double(double)>;

// One row at a time, straight from the formulas.
Results obvious(const ExpertShape& s, const Dispatch& dispatch, const Inputs& in, const Function& f,
                const Function& df) {
  const int64_t E = s.num_experts, D = s.hidden_size, F = s.intermediate_size, U = s.up_rows();
  Results out = {Doubles(in.x_TD.size()),         Doubles(in.x_TD.size()), Doubles(in.up_EUD.size()),
                 Doubles(in.down_EDF.size()),     Doubles(E * U),          Doubles(E * D),
                 Doubles(dispatch.token_R.size())};
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t r = dispatch.offset_E1[e]; r < dispatch.offset_E1[e + 1]; ++r) {
      const int64_t t = dispatch.token_R[r];
      const double w = dispatch.weight_R[r];
      const double *x = &in.x_TD[t * D], *g = &in.grad_out_TD[t * D], *up = &in.up_EUD[e * U * D];
      const double* down = &in.down_EDF[e * D * F];
      Doubles pre(U), inner(F), grad_inner(F), grad_pre(U);
      for (int64_t i = 0; i < U; ++i) {
        pre[i] = in.up_bias_EU[e * U + i];
        for (int64_t d = 0; d < D; ++d) pre[i] += up[i * D + d] * x[d];
      }
      for (int64_t i = 0; i < F; ++i) inner[i] = f(pre[i]) * (s.gated ? pre[F + i] : 1.0);
      for (int64_t d = 0; d < D; ++d) {
        double y = in.down_bias_ED[e * D + d];
        for (int64_t i = 0; i < F; ++i) y += down[d * F + i] * inner[i];
        out.out_TD[t * D + d] += w * y;
        out.grad_weight_R[r] += g[d] * y;
        out.grad_down_bias_ED[e * D + d] += w * g[d];
        for (int64_t i = 0; i < F; ++i) out.grad_down_EDF[(e * D + d) * F + i] += w * g[d] * inner[i];
        for (int64_t i = 0; i < F; ++i) grad_inner[i] += w * g[d] * down[d * F + i];
      }
      for (int64_t i = 0; i < F; ++i) {
        grad_pre[i] = grad_inner[i] * df(pre[i]) * (s.gated ? pre[F + i] : 1.0);
        if (s.gated) grad_pre[F + i] = grad_inner[i] * f(pre[i]);
      }
      for (int64_t i = 0; i < U; ++i) {
        out.grad_up_bias_EU[e * U + i] += grad_pre[i];
        for (int64_t d = 0; d < D; ++d) out.grad_up_EUD[(e * U + i) * D + d] += grad_pre[i] * x[d];
        for (int64_t d = 0; d < D; ++d) out.grad_x_TD[t * D + d] += grad_pre[i] * up[i * D + d];
      }
    }
  }
  return out;
}

// A tensor in its own type, with the doubles of its values.
struct Tensor {
  DType dtype;
  std::vector<float> floats;
  std::vector<BFloat16> halves;

  Tensor(DType type, int64_t n) : dtype(type), floats(n, 1e30f), halves(n, to_bfloat16(1e30f)) {}
  Tensor(DType type, std::vector<float> values) : dtype(type), floats(std::move(values)), halves(rounded(floats)) {}
  void* data() { return dtype == DType::kBF16 ? static_cast<void*>(halves.data()) : floats.data(); }
  Doubles doubles() const {
    if (dtype == DType::kF32) return {floats.begin(), floats.end()};
    Doubles values;
    for (BFloat16 half : halves) values.push_back(to_float(half));
    return values;
  }
};

struct Case {
  int64_t T = 19, D = 24, F = 20, E = 4, K = 2;
  DType x = DType::kF32, weights = DType::kF32;
  Activation activation = Activation::kSilu;
  bool gated = true, bias = false, one_expert = false, dense = false, dropping = false;
};

Dispatch make_case_dispatch(const Case& c, std::mt19937& random) {
  if (c.dense) return dense_dispatch(c.T);
  RouterConfig config;
  config.num_experts = c.E;
  config.top_k = c.K;
  config.normalize = true;
  config.capacity_factor = c.dropping ? 0.5f : 0.0f;
  config.min_capacity = 1;
  std::vector<float> logits = random_floats(c.T * c.E, random);
  for (int64_t t = 0; t < c.T && c.one_expert; ++t) logits[t * c.E + 1] = 50.0f;
  for (int64_t t = 0; t < c.T; ++t) logits[t * c.E] -= 1e3f;  // nobody goes to expert 0
  NativeThreadPool pool(1);
  return make_dispatch(route(config, logits.data(), c.T, {.training = true}, pool));
}

struct Fixture {
  Case c;
  std::mt19937 random{14};
  ExpertShape shape;
  Dispatch dispatch;
  Tensor x, up, down, grad_out;
  std::vector<float> up_bias, down_bias;
  ExpertWeights weights;
  ExpertsContext context;

  explicit Fixture(const Case& given)
      : c(given),
        shape{c.E, c.D, c.F, c.activation, c.gated},
        dispatch(make_case_dispatch(c, random)),
        x(c.x, random_floats(c.T * c.D, random)),
        up(c.weights, random_floats(c.E * shape.up_rows() * c.D, random, 0.3f)),
        down(c.weights, random_floats(c.E * c.D * c.F, random, 0.3f)),
        grad_out(c.x, random_floats(c.T * c.D, random)),
        up_bias(random_floats(c.E * shape.up_rows(), random)),
        down_bias(random_floats(c.E * c.D, random)) {
    weights = {up.data(), down.data(), c.bias ? up_bias.data() : nullptr, c.bias ? down_bias.data() : nullptr,
               c.weights};
  }

  ConstMatrix x_TD() { return row_major(x.data(), c.x, c.T, c.D); }
  ConstMatrix grad_out_TD() { return row_major(grad_out.data(), c.x, c.T, c.D); }
  Inputs inputs() const {
    Inputs in = {x.doubles(),       up.doubles(), down.doubles(), Doubles(up_bias.size()), Doubles(down_bias.size()),
                 grad_out.doubles()};
    if (c.bias) in.up_bias_EU.assign(up_bias.begin(), up_bias.end());
    if (c.bias) in.down_bias_ED.assign(down_bias.begin(), down_bias.end());
    return in;
  }

  Tensor forward(ThreadPool& pool) {
    Tensor out(c.x, c.T * c.D);
    experts_forward(shape, weights, dispatch, x_TD(), row_major(out.data(), c.x, c.T, c.D), &context, pool);
    return out;
  }
};

// Memory for all gradients, or only for those that the bits of `wanted` name.
struct Gradients {
  Tensor x, up, down;
  std::vector<float> up_bias, down_bias, weight;
  ExpertGradients pointers;

  explicit Gradients(const Fixture& f, int wanted = 63)
      : x(f.c.x, f.c.T * f.c.D),
        up(f.c.weights, static_cast<int64_t>(f.up.floats.size())),
        down(f.c.weights, static_cast<int64_t>(f.down.floats.size())),
        up_bias(f.up_bias.size(), 1e30f),
        down_bias(f.down_bias.size(), 1e30f),
        weight(f.dispatch.token_R.size(), 1e30f) {
    if (wanted & 1) pointers.grad_x_TD = x.data();
    if (wanted & 2) pointers.grad_up_EUD = up.data();
    if (wanted & 4) pointers.grad_down_EDF = down.data();
    if (wanted & 8) pointers.grad_up_bias_EU = up_bias.data();
    if (wanted & 16) pointers.grad_down_bias_ED = down_bias.data();
    if (wanted & 32) pointers.grad_weight_R = weight.data();
  }
  void compute(Fixture& f, ThreadPool& pool) {
    experts_backward(f.shape, f.weights, f.dispatch, f.x_TD(), f.grad_out_TD(), f.context, pointers, pool);
  }
};

void expect_near(const Doubles& actual, const Doubles& expected, const Doubles& bound, double relative,
                 const char* name) {
  ASSERT_EQ(actual.size(), expected.size()) << name;
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], relative * bound[i] + 1e-35) << name << " at " << i;
  }
}

Doubles doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

void check(const Case& c, ThreadPool& pool) {
  Fixture f(c);
  const Inputs in = f.inputs();
  Inputs absolute = in;
  for (Doubles* values : {&absolute.x_TD, &absolute.up_EUD, &absolute.down_EDF, &absolute.up_bias_EU,
                          &absolute.down_bias_ED, &absolute.grad_out_TD}) {
    for (double& value : *values) value = std::abs(value);
  }
  const Results expected = obvious(
      f.shape, f.dispatch, in, [&](double v) { return reference::activation_value(c.activation, v); },
      [&](double v) { return reference::activation_derivative(c.activation, v); });
  const Results bound =
      obvious(f.shape, f.dispatch, absolute, [](double v) { return v; }, [](double v) { return 1.13 + 0.8 * v; });
  const bool halves = c.x == DType::kBF16 || c.weights == DType::kBF16;
  const double steps = static_cast<double>(2 * c.D + c.F + f.shape.up_rows() + f.dispatch.num_rows() + 40);
  const double relative = steps * kUnitRoundoff + (halves ? 6 * kBf16UnitRoundoff : 0.0);

  expect_near(f.forward(pool).doubles(), expected.out_TD, bound.out_TD, relative, "out");
  Gradients g(f);
  g.compute(f, pool);
  expect_near(g.x.doubles(), expected.grad_x_TD, bound.grad_x_TD, relative, "grad_x");
  expect_near(g.up.doubles(), expected.grad_up_EUD, bound.grad_up_EUD, relative, "grad_up");
  expect_near(g.down.doubles(), expected.grad_down_EDF, bound.grad_down_EDF, relative, "grad_down");
  expect_near(doubles(g.up_bias), expected.grad_up_bias_EU, bound.grad_up_bias_EU, relative, "grad_up_bias");
  expect_near(doubles(g.down_bias), expected.grad_down_bias_ED, bound.grad_down_bias_ED, relative, "grad_down_bias");
  expect_near(doubles(g.weight), expected.grad_weight_R, bound.grad_weight_R, relative, "grad_weight");

  const PackedExperts packed(f.shape, f.weights, pool);
  Tensor out(c.x, c.T * c.D);
  experts_forward(packed, f.dispatch, f.x_TD(), row_major(out.data(), c.x, c.T, c.D), pool);
  expect_near(out.doubles(), expected.out_TD, bound.out_TD, relative, "packed out");

  Tensor stream(DType::kF32, random_floats(c.T * c.D, f.random));
  Doubles sum = stream.doubles(), sum_bound = sum;
  for (size_t i = 0; i < sum.size(); ++i) {
    sum_bound[i] = std::abs(sum[i]) + bound.out_TD[i];
    sum[i] += expected.out_TD[i];
  }
  experts_forward(packed, f.dispatch, f.x_TD(), row_major(stream.floats.data(), c.T, c.D), pool, /*accumulate=*/true);
  expect_near(stream.doubles(), sum, sum_bound, relative, "added out");
}

TEST(Experts, AllKindsAgreeWithTheObviousVersion) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType x : {DType::kF32, DType::kBF16}) {
      for (DType weights : {DType::kF32, DType::kBF16}) {
        for (Activation activation : {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu}) {
          for (bool gated : {false, true}) {
            check({.x = x, .weights = weights, .activation = activation, .gated = gated, .bias = !gated}, pool);
          }
        }
      }
    }
  });
}

TEST(Experts, OddShapesAndLoads) {
  NativeThreadPool pool(3);
  for_each_isa([&] {
    for (DType type : {DType::kF32, DType::kBF16}) {
      check({.T = 1, .D = 1, .F = 1, .E = 2, .K = 1, .x = type, .weights = type}, pool);
      check({.T = 0, .x = type, .weights = type, .bias = true}, pool);
      check({.T = 33, .D = 17, .F = 65, .E = 7, .K = 3, .x = type, .weights = type, .bias = true}, pool);
      check({.T = 40, .x = type, .weights = type, .one_expert = true}, pool);
      check({.T = 150, .D = 9, .F = 13, .E = 1, .K = 1, .x = type, .weights = type, .bias = true, .dense = true}, pool);
      check({.T = 40, .x = type, .weights = type, .bias = true, .dropping = true}, pool);
      check({.T = 3, .E = 64, .K = 8, .x = type, .weights = type}, pool);
    }
  });
}

TEST(Experts, FrozenGradientsAreLeftAloneAndChangeNothing) {
  NativeThreadPool pool(2);
  Fixture f({.bias = true});
  f.forward(pool);
  Gradients all(f);
  all.compute(f, pool);
  for (int wanted = 0; wanted < 64; ++wanted) {
    Gradients some(f, wanted);
    some.compute(f, pool);
    const std::vector<float>* pairs[][2] = {{&some.x.floats, &all.x.floats},       {&some.up.floats, &all.up.floats},
                                            {&some.down.floats, &all.down.floats}, {&some.up_bias, &all.up_bias},
                                            {&some.down_bias, &all.down_bias},     {&some.weight, &all.weight}};
    for (int i = 0; i < 6; ++i) {
      const bool is_wanted = wanted >> i & 1;
      for (size_t j = 0; j < pairs[i][0]->size(); ++j) {
        ASSERT_EQ((*pairs[i][0])[j], is_wanted ? (*pairs[i][1])[j] : 1e30f) << "wanted " << wanted << " tensor " << i;
      }
    }
  }
}

TEST(Experts, ThreadsAndPackingDoNotChangeBits) {
  NativeThreadPool one(1), two(2), three(3);
  for_each_isa([&] {
    using Types = std::pair<DType, DType>;
    for (auto [x, weights] :
         {Types(DType::kF32, DType::kF32), {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}}) {
      const Case c = {.T = 300, .D = 48, .F = 70, .E = 6, .x = x, .weights = weights, .bias = true};
      Fixture f(c);
      const Doubles out = f.forward(one).doubles();
      Gradients expected(f);
      expected.compute(f, one);
      for (ThreadPool* pool : {static_cast<ThreadPool*>(&two), static_cast<ThreadPool*>(&three)}) {
        ASSERT_EQ(f.forward(*pool).doubles(), out);
        Gradients g(f);
        g.compute(f, *pool);
        ASSERT_EQ(g.x.doubles(), expected.x.doubles());
        ASSERT_EQ(g.up.doubles(), expected.up.doubles());
        ASSERT_EQ(g.down.doubles(), expected.down.doubles());
        ASSERT_EQ(g.up_bias, expected.up_bias);
        ASSERT_EQ(g.down_bias, expected.down_bias);
        ASSERT_EQ(g.weight, expected.weight);
      }
      Tensor packed_out(c.x, c.T * c.D);
      experts_forward(PackedExperts(f.shape, f.weights, two), f.dispatch, f.x_TD(),
                      row_major(packed_out.data(), c.x, c.T, c.D), two);
      ASSERT_EQ(packed_out.doubles(), out);
    }
  });
}

// Panels of every expert's up and down matrices; quantized unless the type is bf16.
PackedExperts packed_as(PanelType type, const ExpertShape& shape, Tensor& up, Tensor& down, ThreadPool& pool) {
  PackedExperts packed;
  packed.shape = shape;
  const auto pack = [&](Tensor& weights, int64_t e, int64_t rows, int64_t cols, bool gated) {
    const ConstMatrix all =
        row_major(static_cast<const void*>(weights.data()), weights.dtype, shape.num_experts * rows, cols);
    const ConstMatrix b = all.row_range(e * rows, rows);
    if (!is_quantized(type)) return PackedMatrix({.type = type, .rows = rows, .cols = cols, .gated = gated}, b, pool);
    return PackedMatrix(QuantizedMatrix(b, type, pool).view(), pool, gated);
  };
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    packed.up_E.push_back(pack(up, e, shape.up_rows(), shape.hidden_size, shape.gated));
    packed.down_E.push_back(pack(down, e, shape.hidden_size, shape.intermediate_size, false));
  }
  return packed;
}

// A token with two experts is rounded before the products, once; with one, by its product.
TEST(Experts, RowsRoundedOnceForSeveralExpertsHaveTheSameBits) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (PanelType type :
         {PanelType::kBF16, PanelType::kInt8, PanelType::kInt8A16, PanelType::kInt4, PanelType::kInt4Group64}) {
      for (int64_t T : {1, 5, 40}) {
        Fixture f({.T = T, .D = 72, .F = 40, .E = 5});
        const PackedExperts packed = packed_as(type, f.shape, f.up, f.down, pool);
        std::vector<int32_t> both_TK, one_T[2];
        std::vector<float> weights_TK[2], weights_T = random_floats(T, f.random);
        for (int32_t t = 0; t < T; ++t) {
          for (int32_t k = 0; k < 2; ++k) {
            one_T[k].push_back((3 * t + 2 * k) % 5);
            both_TK.push_back(one_T[k].back());
            for (int32_t other = 0; other < 2; ++other) weights_TK[other].push_back(k == other ? weights_T[t] : 0.0f);
          }
        }
        const auto forward = [&](const std::vector<int32_t>& ids, const std::vector<float>& weights, int64_t top_k) {
          std::vector<float> out_TD(T * f.c.D);
          experts_forward(packed, make_dispatch(ids.data(), weights.data(), T, top_k, f.c.E), f.x_TD(),
                          row_major(out_TD.data(), T, f.c.D), pool);
          return out_TD;
        };
        for (int k : {0, 1}) {
          ASSERT_EQ(forward(both_TK, weights_TK[k], 2), forward(one_T[k], weights_T, 1))
              << "type " << index_of(type) << ", " << T << " tokens, choice " << k;
        }
      }
    }
  });
}

}  // namespace
}  // namespace coterie
