// One training step on ranks that are threads, at several layouts, against the same step on one rank.
//
// Forward, fp32: equal bits. Gradients: the same terms summed in another order. A sum of n fp32 terms differs between
// orders by at most about n * 2^-24 of the sum of magnitudes, typically by sqrt(n) of it; with n <= 512 (128 tokens, 64
// columns, and the layers that lie behind), 512 * 2^-24 = 3e-5 relative to a gradient's largest value bounds both.
// Slices of experts cut the sums over intermediate units as well, in the forward pass: it has the same bound then.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>

#include "comm/thread_transport.h"
#include "coterie/error.h"
#include "train/expert_layout.h"
#include "train/expert_parallel_json.h"
#include "train/language_model.h"

namespace coterie {
namespace {

constexpr double kRelative = 3e-5;
constexpr int64_t kSequences = 8, kLength = 16;

// Two MoE layers of a pyramid, the second with an MLP beside its experts, as PR-MoE has it.
ModelConfig config_of(int64_t first_experts, int64_t second_experts, int64_t top_k) {
  ModelConfig c;
  c.vocab_size = 61;
  c.hidden_size = 24;
  c.num_heads = c.num_kv_heads = 3;
  c.head_dim = 8;
  c.max_position_embeddings = 32;
  c.initializer_range = 0.2f;  // so that the experts weigh something
  c.mlp_bias = true;
  c.layers.resize(2);
  c.layers[0] = {.expert_intermediate_size = 40, .router = {.num_experts = first_experts, .top_k = top_k}};
  c.layers[1] = {.intermediate_size = 32,
                 .expert_intermediate_size = 16,
                 .residual = ResidualKind::kLearned,
                 .router = {.num_experts = second_experts, .top_k = top_k, .choice_bias = true}};
  return c;
}

struct Step {
  at::Tensor hidden_TD;
  double balance_loss = 0;
  std::map<std::string, at::Tensor> values, gradients;  // of logical tensors
  std::vector<std::vector<uint8_t>> kept;               // of each MoE layer's choices, token by token
};

struct Case {
  ModelConfig config;
  at::ScalarType dtype = at::kFloat;
  std::vector<float> choice_bias = {};  // of layer 1, the first experts'
};

// The same from every thread: torch's generator is one for all of them.
at::Tensor tokens_of_step() {
  static const at::Tensor tokens = [] {
    at::manual_seed(5);
    return at::randint(0, 61, {kSequences, kLength + 1}, at::kLong);
  }();
  return tokens;
}

void set_choice_bias(const LanguageModel& model, const std::vector<float>& bias) {
  for (const Parameter& p : model.parameters()) {
    if (!p.name.ends_with("choice_bias")) continue;
    std::copy(bias.begin(), bias.end(), p.tensor.mutable_data_ptr<float>());
  }
}

// Forward and backward of one rank's part of the batch, everything summed over replicas.
Step run_part(const Case& c, const LanguageModel& model, int rank, int size) {
  at::set_num_threads(1);
  set_choice_bias(model, c.choice_bias);
  const int64_t count = kSequences / size;
  const at::Tensor windows = tokens_of_step().narrow(0, rank * count, count);
  const at::Tensor targets = windows.narrow(1, 1, kLength).reshape({-1});
  const ForwardResult result =
      model.forward(windows.narrow(1, 0, kLength).contiguous(),
                    {.training = true, .seed = 3, .step = 2, .first_token = rank * count * kLength});
  const HeadLoss head = head_loss(result.hidden_TD, model.head(), targets, nullptr);
  ((head.loss + 0.1 * result.balance_loss + 0.01 * result.z_loss) / static_cast<double>(size)).backward();
  Step step{.hidden_TD = result.hidden_TD.detach(), .balance_loss = result.balance_loss.item<double>()};
  for (const auto& routing : result.routings) step.kept.push_back(routing->kept_TK);
  for (const Parameter& p : model.parameters()) {
    step.values[p.name] = p.tensor.detach();
    if (!p.tensor.requires_grad()) continue;
    const at::Tensor gradient = p.tensor.grad().to(at::kFloat).contiguous();
    if (p.replicas) {
      p.replicas->all_reduce(gradient.mutable_data_ptr(), gradient.numel(), DType::kF32, ReduceOp::kSum, p.name);
    }
    step.gradients[p.name] = gradient;
  }
  return step;
}

Step on_one_rank(const Case& c) { return run_part(c, LanguageModel(c.config, c.dtype, /*seed=*/11), 0, 1); }

// The parts of all ranks, put together to logical tensors; what several ranks hold has to be the same on all.
class Assembly {
 public:
  explicit Assembly(int ranks) : parts_(static_cast<size_t>(ranks)) {}

  void set(int rank, const LanguageModel& model, Step step) {
    Part& part = parts_[static_cast<size_t>(rank)];
    part.step = std::move(step);
    for (const Parameter& p : model.parameters()) {
      const int64_t elements = c10::multiply_integers(p.logical_shape);
      part.shapes[p.name] = p.logical_shape;
      part.places[p.name] = own_part(p, at::arange(elements).view(p.logical_shape)).reshape({-1});
    }
  }

  Step result() const {
    Step whole;
    std::vector<at::Tensor> hidden;
    for (const Part& part : parts_) {
      hidden.push_back(part.step.hidden_TD);
      whole.balance_loss += part.step.balance_loss / static_cast<double>(parts_.size());
      whole.kept.resize(part.step.kept.size());
      for (size_t i = 0; i < whole.kept.size(); ++i) {
        whole.kept[i].insert(whole.kept[i].end(), part.step.kept[i].begin(), part.step.kept[i].end());
      }
    }
    whole.hidden_TD = at::cat(hidden);
    for (const auto& [name, shape] : parts_[0].shapes) {
      whole.values[name] = joined(name, shape, &Step::values);
      if (parts_[0].step.gradients.count(name)) whole.gradients[name] = joined(name, shape, &Step::gradients);
    }
    return whole;
  }

 private:
  struct Part {
    Step step;
    std::map<std::string, std::vector<int64_t>> shapes;  // logical
    std::map<std::string, at::Tensor> places;            // in the logical tensor, of each own element
  };

  at::Tensor joined(const std::string& name, const std::vector<int64_t>& shape,
                    std::map<std::string, at::Tensor> Step::* of) const {
    const at::Tensor whole = at::full(shape, NAN), flat = whole.view({-1});
    for (const Part& part : parts_) {
      const at::Tensor own = (part.step.*of).at(name).reshape({-1}).to(at::kFloat), place = part.places.at(name);
      const at::Tensor before = flat.index_select(0, place);
      EXPECT_TRUE(before.isnan().all().item<bool>() || before.equal(own)) << name << ": replicas differ";
      flat.index_copy_(0, place, own);
    }
    EXPECT_FALSE(whole.isnan().any().item<bool>()) << name << ": is on no rank";
    return whole;
  }

  std::vector<Part> parts_;
};

Step on_ranks(const Case& c, int ranks, const ExpertParallelSettings& parallel) {
  Assembly assembly(ranks);
  run_ranks(ranks, 30, [&](ProcessGroup& world) {
    const LanguageModel model(c.config, c.dtype, /*seed=*/11, &world, parallel);
    assembly.set(world.rank(), model, run_part(c, model, world.rank(), world.size()));
  });
  return assembly.result();
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, const std::string& what, double relative) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  const double error = (actual - expected).abs().max().item<double>();
  EXPECT_LE(error, relative * expected.abs().max().item<double>()) << what;
}

void expect_same_steps(const Step& one, const Step& many, bool slices) {
  for (const auto& [name, value] : one.values) EXPECT_TRUE(at::equal(many.values.at(name), value)) << name;
  EXPECT_EQ(many.kept, one.kept);
  expect_close(many.hidden_TD, one.hidden_TD, "forward", slices ? kRelative : 0.0);
  EXPECT_NEAR(many.balance_loss, one.balance_loss, kRelative * one.balance_loss);
  ASSERT_EQ(many.gradients.size(), one.gradients.size());
  for (const auto& [name, gradient] : one.gradients) expect_close(many.gradients.at(name), gradient, name, kRelative);
}

// With passes that go through whole, and in two parts. slices: whether the layout cuts experts, so that the forward
// pass has other sums.
void expect_same_step(const Case& c, int ranks, ExpertParallelSettings parallel, bool slices = false) {
  const Step one = on_one_rank(c);
  expect_same_steps(one, on_ranks(c, ranks, parallel), slices);
  SCOPED_TRACE("in two parts");
  parallel.tokens_per_rank = 1 << 20;
  expect_same_steps(one, on_ranks(c, ranks, parallel), slices);
}

TEST(ExpertParallel, TwoRanks) {
  for (const int64_t top_k : {1, 2}) expect_same_step({config_of(4, 4, top_k)}, 2, {.expert_parallel = {2}});
}

TEST(ExpertParallel, FourRanks) {
  for (const int64_t top_k : {1, 2}) expect_same_step({config_of(4, 8, top_k)}, 4, {.expert_parallel = {4}});
}

TEST(ExpertParallel, TwoRanksTwice) {
  for (const int64_t top_k : {1, 2}) expect_same_step({config_of(4, 4, top_k)}, 4, {.expert_parallel = {2}});
}

TEST(ExpertParallel, EveryRankHasAllExperts) { expect_same_step({config_of(4, 4, 2)}, 2, {.expert_parallel = {1}}); }

TEST(ExpertParallel, PyramidOfDegrees) {
  expect_same_step({config_of(2, 4, 2)}, 4, {.expert_parallel = {ExpertParallelSettings::kAuto}});  // 2 and 4
  expect_same_step({config_of(4, 8, 1)}, 4, {.expert_parallel = {1, 4}});
}

TEST(ExpertParallel, ExchangesInTwoSteps) {
  expect_same_step({config_of(4, 8, 2)}, 4,
                   {.expert_parallel = {4}, .ranks_per_node = 2, .all_to_all = AllToAllAlgorithm::kHierarchical});
  expect_same_step({config_of(4, 8, 2)}, 4, {.expert_parallel = {4}, .ranks_per_node = 2, .tokens_per_rank = 32});
}

// All tokens go to the experts of the first rank, or of the last.
TEST(ExpertParallel, RanksWhoseExpertsGetNothing) {
  expect_same_step({.config = config_of(4, 4, 1), .choice_bias = {9, 0, 0, 0}}, 4, {.expert_parallel = {4}});
  expect_same_step({.config = config_of(4, 4, 2), .choice_bias = {9, 8, 0, 0}}, 2, {.expert_parallel = {2}});
  expect_same_step({.config = config_of(4, 4, 2), .choice_bias = {0, 0, 8, 9}}, 4, {.expert_parallel = {4}});
}

// Who gets a place is decided among the tokens of all ranks, by every rule; where every rank has all experts, too.
TEST(ExpertParallel, LimitedCapacity) {
  for (const DropPolicy policy : {DropPolicy::kRandom, DropPolicy::kPosition, DropPolicy::kProbability}) {
    for (const int64_t degree : {1, 2, 4}) {
      Case c{config_of(4, 8, 2)};
      for (LayerConfig& layer : c.config.layers) {
        layer.router.capacity_factor = 1.0f;
        layer.router.drop_policy = policy;
        layer.router.normalize = true;
      }
      const Step one = on_one_rank(c);
      EXPECT_GT(std::count(one.kept[0].begin(), one.kept[0].end(), 0), 0);
      expect_same_step(c, 4, {.expert_parallel = {degree}});
    }
  }
}

TEST(ExpertParallel, ExpertsChoose) {
  Case c{config_of(4, 8, 2)};
  c.config.layers[0].router.chooser = Chooser::kExperts;
  c.config.layers[0].router.capacity_factor = 1.0f;
  expect_same_step(c, 4, {.expert_parallel = {2}});
}

// Each expert on two ranks or more: one stretch of its intermediate units each. 4 ranks with 1 expert in two slices
// hold it twice.
TEST(ExpertParallel, Slices) {
  for (const bool gated : {true, false}) {
    for (const bool bias : {true, false}) {
      const auto check = [&](int64_t experts, int64_t top_k, int ranks, const std::vector<int64_t>& degrees) {
        SCOPED_TRACE(std::to_string(experts) + " experts on " + std::to_string(ranks) + " ranks" +
                     (gated ? ", gated" : "") + (bias ? ", biases" : ""));
        Case c{config_of(experts, experts, top_k)};
        c.config.gated_mlp = gated;
        c.config.mlp_bias = bias;
        expect_same_step(c, ranks, {.expert_parallel = degrees}, true);
      };
      check(2, 1, 4, {4});
      check(2, 2, 4, {4});
      check(1, 1, 2, {2});
      check(1, 1, 4, {2});
      check(1, 1, 4, {4});
      check(2, 2, 4, {4, 2});
    }
  }
}

TEST(ExpertParallel, SlicesWithLimitedCapacity) {
  Case c{config_of(2, 2, 1)};
  for (LayerConfig& layer : c.config.layers) layer.router.capacity_factor = 0.8f;
  const Step one = on_one_rank(c);
  EXPECT_GT(std::count(one.kept[0].begin(), one.kept[0].end(), 0), 0);
  expect_same_step(c, 4, {.expert_parallel = {4}}, true);
}

TEST(ExpertParallel, SlicesOfExpertsThatGetNothing) {
  expect_same_step({.config = config_of(2, 2, 1), .choice_bias = {9, 0}}, 4, {.expert_parallel = {4}}, true);
}

TEST(ExpertParallel, ExchangesSlicesInTwoSteps) {
  expect_same_step({config_of(2, 2, 2)}, 4,
                   {.expert_parallel = {4}, .ranks_per_node = 2, .all_to_all = AllToAllAlgorithm::kHierarchical}, true);
}

// 0, 1, 2 and 3 tokens on the ranks: parts without tokens take part, and the rows' results are those of one part.
TEST(ExpertParallel, PartsWithoutTokens) {
  constexpr int64_t kHidden = 8, kInner = 12, kRanks = 4;
  run_ranks(kRanks, 30, [&](ProcessGroup& world) {
    const int64_t T = world.rank();
    const auto leaf = [](at::IntArrayRef sizes, int64_t step) {
      const int64_t count = c10::multiply_integers(sizes);
      return (at::arange(count) * step).remainder(17).to(at::kFloat).mul_(0.05).view(sizes).set_requires_grad(true);
    };
    struct Result {
      at::Tensor out, grad_x, grad_weights, grad_up, grad_down;
    };
    const auto run = [&](int64_t parts) {
      ExpertRanks ranks{.num_experts = 1, .parts = parts, .group = &world, .label = "test"};
      ranks.exchange = std::make_unique<AllToAll>(world, kRanks, AllToAllAlgorithm::kFlat, LinkModel{}, 0);
      const at::Tensor x = leaf({T, kHidden}, 5), weights = leaf({T, 2}, 3);
      const at::Tensor up = leaf({1, kInner, kHidden}, 7), down = leaf({1, kHidden, kInner}, 11);
      const at::Tensor ids = at::arange(2 * T).remainder(kRanks).view({T, 2});
      const at::Tensor out = experts_of_ranks(x, ids, weights, {up, {}, down, {}}, Activation::kSilu, false, ranks);
      out.square().sum().backward();
      return Result{out.detach(), x.grad(), weights.grad(), up.grad(), down.grad()};
    };
    const Result whole = run(1), parts = run(2);
    EXPECT_TRUE(parts.out.equal(whole.out));
    EXPECT_TRUE(parts.grad_x.equal(whole.grad_x));
    EXPECT_TRUE(parts.grad_weights.equal(whole.grad_weights));
    expect_close(parts.grad_up, whole.grad_up, "up", kRelative);
    expect_close(parts.grad_down, whole.grad_down, "down", kRelative);
  });
}

// 4 experts of top-1 on 2 ranks have half of a rank's tokens each.
TEST(ExpertParallel, LargePassesGoThroughInParts) {
  for (const auto& [tokens, parts] : {std::pair(0, 1), {4095, 1}, {4096, 2}}) {
    run_ranks(2, 30, [&](ProcessGroup& world) {
      const ExpertLayout layout(world, {.expert_parallel = {2}, .tokens_per_rank = tokens}, config_of(4, 4, 1), 4);
      EXPECT_EQ(layout.layer(0)->parts, parts) << tokens;
    });
  }
}

// What experts return is rounded to bf16 on its way (2^-9 relative), in both layers; gradients likewise, both ways.
TEST(ExpertParallel, Bf16) {
  const auto norm = [](const at::Tensor& t) { return t.to(at::kDouble).norm().item<double>(); };
  for (const int64_t experts : {2, 4}) {  // 2: in two slices
    const Case c{.config = config_of(experts, experts, 2), .dtype = at::kBFloat16};
    const Step one = on_one_rank(c), many = on_ranks(c, 4, {.expert_parallel = {4}});
    EXPECT_LE(norm(many.hidden_TD - one.hidden_TD), 0x1p-7 * norm(one.hidden_TD));
  }
}

TEST(ExpertParallel, AutomaticDegrees) {
  const auto degrees = [](int64_t first, int64_t second, int64_t ranks) {
    return expert_parallel_degrees({}, config_of(first, second, 1), ranks);
  };
  EXPECT_EQ(degrees(32, 64, 64), (std::vector<int64_t>{32, 64}));
  EXPECT_EQ(degrees(8, 2, 4), (std::vector<int64_t>{4, 2}));
  EXPECT_EQ(degrees(6, 9, 4), (std::vector<int64_t>{2, 1}));
}

std::string refusal(const std::vector<int64_t>& expert_parallel, int64_t ranks) {
  try {
    expert_parallel_degrees({.expert_parallel = expert_parallel}, config_of(4, 8, 1), ranks);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "none";
}

TEST(ExpertParallel, RefusesWhatDoesNotDivide) {
  EXPECT_EQ(refusal({4, 8}, 8), "none");
  EXPECT_EQ(refusal({3}, 4), "parallel.expert_parallel: 3 does not divide the 4 ranks");
  EXPECT_EQ(refusal({8}, 8), "none");  // 4 experts in two slices, and 8
  EXPECT_EQ(refusal({4, 6}, 12),
            "parallel.expert_parallel: 6 is neither a divisor nor a multiple of the 8 experts of layer 1");
  EXPECT_EQ(refusal({12}, 12),
            "parallel.expert_parallel: 12 cuts each expert of layer 0 into 3 slices, which do not divide its "
            "expert_intermediate_size (40)");
  EXPECT_EQ(refusal({4, 128}, 128),
            "parallel.expert_parallel: 128 cuts each expert of layer 1 into 16 slices, which do not divide its "
            "hidden_size, the length of a bias (24)");
  EXPECT_EQ(refusal({-1}, 4), "parallel.expert_parallel: -1 is below 1");
  EXPECT_EQ(refusal({1, 2, 4}, 4), "parallel.expert_parallel: has 3 entries, the model 2 MoE layers");
}

TEST(ExpertParallel, ReadsTheSetting) {
  EXPECT_EQ(expert_parallel_from_json(R"("auto")"), std::vector<int64_t>{ExpertParallelSettings::kAuto});
  EXPECT_EQ(expert_parallel_from_json("4"), std::vector<int64_t>{4});
  EXPECT_EQ(expert_parallel_from_json(R"([2, "auto", 8])"), (std::vector<int64_t>{2, 0, 8}));
  for (const char* bad : {"0", "-2", "1.5", "[]", "[2, 0]", R"("most")", "null", "[[2]]"}) {
    try {
      expert_parallel_from_json(bad);
      ADD_FAILURE() << bad;
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(std::string(error.what()),
                std::string("parallel.expert_parallel: must be \"auto\", a positive number or a list of these (") +
                    bad + ")");
    }
  }
}

}  // namespace
}  // namespace coterie
