// Our differentiable ops against the same thing written in ATen, values and gradients.
//
// Tolerances: a dot product of n fp32 terms differs between orders of summation by at most about
// n * 2^-24 of the sum of magnitudes; typical is sqrt(n). With n <= 512 here, 512 * 2^-24 = 3e-5
// relative to the largest value bounds both.
#include "train/ops.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>

#include "moe/experts.h"
#include "train/torch_pool.h"

namespace coterie {
namespace {

constexpr double kRelative = 3e-5;

at::Tensor random_leaf(at::IntArrayRef shape, uint64_t seed, double std = 1.0) {
  at::manual_seed(seed);
  return (at::randn(shape) * std).set_requires_grad(true);
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, const char* what, double relative = kRelative) {
  ASSERT_TRUE(actual.defined()) << what;
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  const double largest = expected.abs().max().item<double>();
  const double error = (actual - expected).abs().max().item<double>();
  EXPECT_LE(error, relative * largest) << what;
}

// Runs f on the leaves and returns its gradients for a fixed random weighting of the output.
template <typename F>
std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& leaves, const F& f) {
  at::Tensor y = f();
  at::manual_seed(99);
  (y * at::randn(y.sizes())).sum().backward();
  std::vector<at::Tensor> out{y.detach()};
  for (at::Tensor leaf : leaves) {
    out.push_back(leaf.grad().clone());
    leaf.mutable_grad().reset();
  }
  return out;
}

template <typename F, typename G>
void expect_same(const std::vector<at::Tensor>& leaves, const F& ours, const G& oracle) {
  const auto actual = gradients(leaves, ours);
  const auto expected = gradients(leaves, oracle);
  for (size_t i = 0; i < actual.size(); ++i) expect_close(actual[i], expected[i], std::to_string(i).c_str());
}

TEST(TorchPool, RunsOnAllThreadsAtOnce) {
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  std::atomic<int> arrived{0};
  std::atomic<bool> met{false};
  // Each task waits for the other, so that one thread alone cannot finish both.
  torch_pool().run(2, [&](int64_t, int) {
    ++arrived;
    for (int64_t spin = 0; spin < 1'000'000'000 && arrived < 2; ++spin)
      std::atomic_signal_fence(std::memory_order_seq_cst);
    if (arrived == 2) met = true;
  });
  at::set_num_threads(before);
  EXPECT_TRUE(met);
}

TEST(LinearOp, EqualsAten) {
  for (int64_t num_tokens : {1, 7, 65}) {
    const at::Tensor x = random_leaf({num_tokens, 33}, 1), w = random_leaf({47, 33}, 2), b = random_leaf({47}, 3);
    expect_same({x, w, b}, [&] { return linear(x, w, b); }, [&] { return at::linear(x, w, b); });
    expect_same({x, w}, [&] { return linear(x, w, at::Tensor()); }, [&] { return at::linear(x, w); });
  }
}

TEST(RmsNormOp, EqualsAten) {
  for (int64_t width : {1, 15, 64, 576}) {
    const at::Tensor x = random_leaf({37, width}, 1), w = random_leaf({width}, 2);
    expect_same({x, w}, [&] { return rms_norm(x, w, 1e-5); }, [&] { return at::rms_norm(x, {width}, w, 1e-5); });
  }
}

TEST(AddNormOp, EqualsAten) {
  const at::Tensor x = random_leaf({37, 48}, 1), y = random_leaf({37, 48}, 2), w = random_leaf({48}, 3);
  const at::Tensor b = random_leaf({48}, 4);
  const auto both = [](const Normalized& n) { return n.sum_TD + n.normed_TD.sin(); };
  expect_same(
      {x, y, w, b}, [&] { return both(add_norm(x, y, w, b, {NormKind::kLayerNorm, 1e-5f})); },
      [&] { return both({x + y, at::layer_norm(x + y, {48}, w, b, 1e-5)}); });
  expect_same(
      {x, w, b}, [&] { return both(add_norm(x, {}, w, b, {NormKind::kLayerNorm, 1e-5f})); },
      [&] { return both({x, at::layer_norm(x, {48}, w, b, 1e-5)}); });
  expect_same(
      {x, y, w}, [&] { return both(add_norm(x, y, w, {}, {NormKind::kRmsNorm, 1e-5f})); },
      [&] { return both({x + y, at::rms_norm(x + y, {48}, w, 1e-5)}); });
  // One of the two results alone.
  expect_same(
      {x, y, w}, [&] { return add_norm(x, y, w, {}, {NormKind::kRmsNorm, 1e-5f}).normed_TD; },
      [&] { return at::rms_norm(x + y, {48}, w, 1e-5); });
}

// The formula of rotary positions, in doubles.
at::Tensor rotated(const at::Tensor& x, int64_t sequence, int64_t dim) {
  const at::Tensor frequency = at::pow(10000.0, at::arange(dim / 2, at::kDouble) * (-2.0 / dim));
  const at::Tensor angle = at::arange(x.size(0), at::kDouble).remainder(sequence).unsqueeze(1) * frequency;
  const at::Tensor c = angle.cos().to(at::kFloat).unsqueeze(1), s = angle.sin().to(at::kFloat).unsqueeze(1);
  const at::Tensor heads = x.view({x.size(0), -1, dim});
  const at::Tensor a = heads.narrow(2, 0, dim / 2), b = heads.narrow(2, dim / 2, dim / 2);
  return at::cat({a * c - b * s, b * c + a * s}, 2).view(x.sizes());
}

at::Tensor slow_attention(const at::Tensor& qkv, const CausalShape& shape, bool rotate) {
  const auto parts = qkv.split_with_sizes({shape.H * shape.d, shape.G * shape.d, shape.G * shape.d}, 1);
  const auto heads_first = [&](const at::Tensor& x, bool rotates) {
    const at::Tensor y = rotates ? rotated(x.contiguous(), shape.S, shape.d) : x;
    return y.reshape({shape.B, shape.S, -1, shape.d}).transpose(1, 2);
  };
  const at::Tensor out = at::scaled_dot_product_attention(heads_first(parts[0], rotate), heads_first(parts[1], rotate),
                                                          heads_first(parts[2], false), {}, 0.0,
                                                          /*is_causal=*/true, std::nullopt, /*enable_gqa=*/true);
  return out.transpose(1, 2).reshape({shape.num_tokens(), -1});
}

TEST(AttentionOp, EqualsAten) {
  for (const CausalShape& shape :
       {CausalShape{.B = 2, .S = 5, .H = 3, .G = 3, .d = 8}, CausalShape{.B = 1, .S = 65, .H = 4, .G = 2, .d = 32}}) {
    const at::Tensor qkv = random_leaf({shape.num_tokens(), shape.columns()}, 1);
    for (const bool rotates : {false, true}) {
      expect_same(
          {qkv}, [&] { return causal_attention(qkv, shape, rotates ? 10000.0 : 0.0); },
          [&] { return slow_attention(qkv, shape, rotates); });
    }
  }
}

struct ExpertCase {
  int64_t num_experts, top_k, num_tokens;
  bool gated, bias;
};

// Every token through each of its experts, one by one.
at::Tensor slow_experts(const ExpertShape& shape, const Routing& routing, const at::Tensor& x,
                        const at::Tensor& weights, const ExpertTensors& t) {
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < x.size(0); ++i) {
    at::Tensor sum = at::zeros({x.size(1)});
    for (int64_t k = 0; k < routing.top_k; ++k) {
      if (!routing.kept_TK[static_cast<size_t>(i * routing.top_k + k)]) continue;
      const int64_t e = routing.expert_ids_TK[static_cast<size_t>(i * routing.top_k + k)];
      at::Tensor up = at::matmul(t.up_EUD[e], x[i]);
      if (t.up_bias_EU.defined()) up = up + t.up_bias_EU[e];
      const int64_t inner = shape.intermediate_size;
      up = shape.gated ? at::silu(up.narrow(0, 0, inner)) * up.narrow(0, inner, inner) : at::silu(up);
      at::Tensor down = at::matmul(t.down_EDF[e], up);
      if (t.down_bias_ED.defined()) down = down + t.down_bias_ED[e];
      sum = sum + weights[i][k] * down;
    }
    rows.push_back(sum);
  }
  return at::stack(rows);
}

TEST(ExpertsOp, EqualsTheSlowLoopWithRouting) {
  for (const ExpertCase& c : {ExpertCase{1, 1, 9, true, false}, ExpertCase{7, 3, 33, true, true},
                              ExpertCase{4, 1, 17, false, true}, ExpertCase{64, 2, 5, true, false}}) {
    const ExpertShape shape{.num_experts = c.num_experts,
                            .hidden_size = 19,
                            .intermediate_size = 13,
                            .activation = Activation::kSilu,
                            .gated = c.gated};
    const at::Tensor x = random_leaf({c.num_tokens, 19}, 1), logits = random_leaf({c.num_tokens, c.num_experts}, 2);
    ExpertTensors t{.up_EUD = random_leaf({c.num_experts, shape.up_rows(), 19}, 3),
                    .down_EDF = random_leaf({c.num_experts, 19, 13}, 4)};
    std::vector<at::Tensor> leaves{x, logits, t.up_EUD, t.down_EDF};
    if (c.bias) {
      t.up_bias_EU = random_leaf({c.num_experts, shape.up_rows()}, 5);
      t.down_bias_ED = random_leaf({c.num_experts, 19}, 6);
      leaves.insert(leaves.end(), {t.up_bias_EU, t.down_bias_ED});
    }
    for (float capacity : {0.0f, 1.0f}) {
      // A single normalised weight is the constant 1: nothing to compare its zero gradient with.
      const RouterConfig router{.num_experts = c.num_experts,
                                .top_k = c.top_k,
                                .normalize = c.top_k > 1,
                                .capacity_factor = capacity,
                                .min_capacity = 1};
      std::shared_ptr<Routing> routing = route_tokens(router, logits, {.training = true}).routing;
      const auto ours = [&] {
        const Routed routed = route_tokens(router, logits, {.training = true});
        return experts(x, routed.expert_ids_TK, routed.weights_TK, t, shape.activation, shape.gated);
      };
      const auto oracle = [&] {
        const at::Tensor probs = at::softmax(logits, 1);
        const at::Tensor ids =
            at::from_blob(routing->expert_ids_TK.data(), {c.num_tokens, c.top_k}, at::kInt).to(at::kLong);
        const at::Tensor chosen = probs.gather(1, ids);
        return slow_experts(shape, *routing, x, c.top_k > 1 ? chosen / chosen.sum(1, true) : chosen, t);
      };
      expect_same(leaves, ours, oracle);
    }
  }
}

TEST(HeadLoss, EqualsAtenWithAndWithoutTeacher) {
  constexpr int64_t kTokens = 1100;  // more than a chunk
  const at::Tensor x = random_leaf({kTokens, 24}, 1), w = random_leaf({101, 24}, 2, 0.3);
  at::manual_seed(3);
  const at::Tensor targets = at::randint(0, 101, {kTokens}, at::kLong);
  const TeacherSignal teacher{
      .hidden_TD = at::randn({kTokens, 16}), .head_VD = at::randn({101, 16}) * 0.3, .alpha = 0.7, .temperature = 2.0};
  for (const TeacherSignal* signal : {static_cast<const TeacherSignal*>(nullptr), &teacher}) {
    const auto oracle = [&] {
      const at::Tensor logits = at::linear(x, w);
      at::Tensor loss = at::cross_entropy_loss(logits, targets);
      if (!signal) return loss;
      const at::Tensor log_p = at::log_softmax(at::linear(teacher.hidden_TD, teacher.head_VD) / 2.0, 1);
      const at::Tensor log_q = at::log_softmax(logits / 2.0, 1);
      return loss + 0.7 * 4.0 * (log_p.exp() * (log_p - log_q)).sum() / kTokens;
    };
    expect_same({x, w}, [&] { return head_loss(x, w, targets, signal).loss; }, oracle);
  }
}

}  // namespace
}  // namespace coterie
