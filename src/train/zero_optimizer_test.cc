// The optimizer against torch's Adam and AdamW formulas in doubles, over several steps.
#include "train/zero_optimizer.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>

#include "comm/thread_transport.h"
#include "coterie/error.h"

namespace coterie {
namespace {

constexpr double kLearningRate = 0.05, kMaxNorm = 1.0;

// Of three parameters, each with its own.
std::vector<AdamWSettings> settings() {
  return {{.learning_rate = kLearningRate, .weight_decay = 0.1},
          {.learning_rate = 0.4 * kLearningRate, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-6},
          {.learning_rate = kLearningRate, .weight_decay = 0.2, .decoupled = false}};
}

// A matrix, larger than one task, a bias of two axes and a vector; the last has no gradient at first.
std::vector<Parameter> parameters(at::ScalarType dtype) {
  at::manual_seed(1);
  std::vector<Parameter> made;
  for (const auto& [name, sizes] : {std::pair("up.weight", std::vector<int64_t>{3, 70, 100}),
                                    {"up.bias", std::vector<int64_t>{3, 70}},
                                    {"norm.weight", std::vector<int64_t>{5}}}) {
    const bool matrix = made.empty();
    made.push_back({name, at::randn(sizes).to(matrix ? dtype : at::kFloat).set_requires_grad(true), sizes});
  }
  return made;
}

at::Tensor random_gradient(const Parameter& parameter, uint64_t seed) {
  at::manual_seed(seed);
  return at::randn(parameter.tensor.sizes()).to(parameter.tensor.scalar_type());
}

struct Oracle {
  at::Tensor w, m, v;

  void step(const at::Tensor& clipped, const AdamWSettings& s, int t) {
    const at::Tensor gradient = s.decoupled ? clipped : clipped + s.weight_decay * w;
    const double decay = s.decoupled ? s.weight_decay : 0.0;
    m = s.beta1 * m + (1 - s.beta1) * gradient;
    v = s.beta2 * v + (1 - s.beta2) * gradient * gradient;
    const at::Tensor root = (v / (1 - std::pow(s.beta2, t))).sqrt() + s.eps;
    w = w * (1 - s.learning_rate * decay) - s.learning_rate * m / (1 - std::pow(s.beta1, t)) / root;
  }
};

// Three steps of `micro_batches` each. An element moves by about the learning rate in a step, so that errors of fp32,
// a few hundred 2^-24 of it in three steps (rows_test.cc has the bound of one), stay below 1e-5.
void check(at::ScalarType dtype, int micro_batches) {
  const std::vector<Parameter> trained = parameters(dtype);
  ZeroOptimizer optimizer(trained, micro_batches, {}, nullptr);
  std::vector<Oracle> oracles;
  for (const Parameter& p : trained) {
    const at::Tensor w = p.tensor.detach().to(at::kDouble);
    oracles.push_back({w, at::zeros_like(w), at::zeros_like(w)});
  }
  for (int t = 1; t <= 3; ++t) {
    std::vector<at::Tensor> sums;
    double squares = 0;
    for (size_t i = 0; i < trained.size(); ++i) sums.push_back(at::zeros_like(oracles[i].w));
    for (int part = 0; part < micro_batches; ++part) {
      for (size_t i = 0; i < trained.size(); ++i) {
        if (i == 2 && t == 1) continue;
        at::Tensor(trained[i].tensor).mutable_grad() = random_gradient(trained[i], 100 * t + 10 * part + i);
        sums[i] += trained[i].tensor.grad();
      }
      optimizer.accumulate_gradients();
      for (const Parameter& p : trained) EXPECT_FALSE(p.tensor.grad().defined());
    }
    for (const at::Tensor& sum : sums) squares += sum.square().sum().item<double>();
    EXPECT_NEAR(optimizer.step(settings(), kMaxNorm), std::sqrt(squares), 1e-5 * std::sqrt(squares));
    for (size_t i = 0; i < trained.size(); ++i) oracles[i].step(sums[i] / std::sqrt(squares), settings()[i], t);
  }
  const std::vector<StateView> views = optimizer.state_views();
  ASSERT_EQ(views.size(), 3 * trained.size());
  for (size_t i = 0; i < trained.size(); ++i) {
    const at::Tensor master = views[3 * i].values.view_as(trained[i].tensor);
    EXPECT_EQ(views[3 * i].name, trained[i].name);
    EXPECT_LT((master - oracles[i].w).abs().max().item<double>(), 1e-5) << trained[i].name;
    EXPECT_TRUE(trained[i].tensor.equal(master.to(trained[i].tensor.scalar_type()))) << trained[i].name;
    const at::Tensor moment = views[3 * i + 1].values.view_as(trained[i].tensor);
    EXPECT_LT((moment - oracles[i].m).abs().max().item<double>(), 1e-5) << trained[i].name;
  }
}

TEST(ZeroOptimizer, EqualsTheFormula) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int micro_batches : {1, 3}) check(dtype, micro_batches);
  }
}

// It writes through pointers, which torch does not see by itself.
TEST(ZeroOptimizer, TorchLearnsOfChanges) {
  const std::vector<Parameter> trained = parameters(at::kBFloat16);
  ZeroOptimizer optimizer(trained, 1, {}, nullptr);
  const auto version = [&] { return trained[0].tensor._version(); };
  const auto before = version();
  trained[0].tensor.mutable_grad() = random_gradient(trained[0], 1);
  optimizer.accumulate_gradients();
  optimizer.step(settings(), kMaxNorm);
  const auto after = version();
  EXPECT_GT(after, before);
  optimizer.publish_masters();
  EXPECT_GT(version(), after);
}

TEST(ZeroOptimizer, BitsDontDependOnThreads) {
  const int before = at::get_num_threads();
  std::vector<at::Tensor> results;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const std::vector<Parameter> trained = parameters(at::kBFloat16);
    ZeroOptimizer optimizer(trained, 1, {}, nullptr);
    for (const Parameter& p : trained) at::Tensor(p.tensor).mutable_grad() = random_gradient(p, 7);
    optimizer.accumulate_gradients();
    results.push_back(at::scalar_tensor(optimizer.step(settings(), kMaxNorm), at::kDouble));
    results.push_back(trained[0].tensor.detach());
  }
  at::set_num_threads(before);
  EXPECT_TRUE(results[0].equal(results[2]));
  EXPECT_TRUE(results[1].equal(results[3]));
}

// Gradients that never change: the second moment goes to their square, by 1 / 1000 of the way in each step, which
// rounding to the nearest in bf16 (2^-9 of it) would stop at a third. The mean over 2000 elements is off by the noise
// that a moment gathers, 2^-8 times the root of 500 steps at most, over the root of 2000.
TEST(ZeroOptimizer, MomentsInBf16HaveTheMeanOfFp32) {
  const int64_t n = 2000;
  const at::Tensor weight = at::zeros({n}).set_requires_grad(true);
  const std::vector<Parameter> one = {{"norm.weight", weight, {n}}};
  ParallelSettings parallel;
  parallel.states.moments_dtype = "bf16";
  ZeroOptimizer optimizer(one, 1, parallel, nullptr);
  const std::vector<AdamWSettings> s(1, {.learning_rate = 1e-3, .beta2 = 0.999});
  constexpr int kSteps = 2000;
  for (int t = 0; t < kSteps; ++t) {
    weight.mutable_grad() = at::full({n}, 0.3f);
    optimizer.accumulate_gradients();
    optimizer.step(s, 0.0);
  }
  const std::vector<StateView> views = optimizer.state_views();
  ASSERT_EQ(views[2].name, "optimizer.exp_avg_sq.norm.weight");
  EXPECT_EQ(views[2].values.scalar_type(), at::kBFloat16);
  const double expected = 0.09 * (1 - std::pow(0.999, kSteps)), noise = 0x1p-8 * std::sqrt(500.0 / 2000.0);
  EXPECT_NEAR(views[2].values.to(at::kDouble).mean().item<double>() / expected, 1.0, 5 * noise);
  // Every step moves a weight by the learning rate, as an exact AdamW does, within the noise of a moment.
  EXPECT_NEAR(weight.detach().to(at::kDouble).mean().item<double>(), -1e-3 * kSteps, 1e-3 * kSteps * 0.02);
}

// The same bits as in memory, and no file is left.
TEST(ZeroOptimizer, StatesInMappedFiles) {
  const std::filesystem::path directory =
      std::filesystem::temp_directory_path() / ("coterie-states-" + std::to_string(getpid()));
  std::filesystem::create_directories(directory);
  std::vector<at::Tensor> results;
  for (const std::string& path : {std::string(), directory.string()}) {
    const std::vector<Parameter> trained = parameters(at::kBFloat16);
    ParallelSettings parallel;
    parallel.states.offload_path = path;
    ZeroOptimizer optimizer(trained, 1, parallel, nullptr);
    for (int step = 0; step < 3; ++step) {
      for (size_t i = 0; i < trained.size(); ++i)
        at::Tensor(trained[i].tensor).mutable_grad() = random_gradient(trained[i], 20 + i);
      optimizer.accumulate_gradients();
      optimizer.step(settings(), kMaxNorm);
    }
    for (const StateView& view : optimizer.state_views()) results.push_back(view.values.clone());
  }
  for (size_t i = 0; i < results.size() / 2; ++i) EXPECT_TRUE(results[i].equal(results[i + results.size() / 2])) << i;
  EXPECT_TRUE(std::filesystem::is_empty(directory));
  std::filesystem::remove(directory);
  ParallelSettings parallel;
  parallel.states.offload_path = directory.string();
  try {
    const std::vector<Parameter> trained = parameters(at::kFloat);
    ZeroOptimizer(trained, 1, parallel, nullptr);
    FAIL() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(error.what(), "parallel.offload_optimizer: " + directory.string() + ": No such file or directory");
  }
}

// Two ranks: a matrix and a norm that both hold, and a matrix that each has alone, as experts are. Gradients come from
// a backward pass; the norm has none on rank 1 and in the second pass. The oracle is one rank that holds all three and
// both matrices, with the sum of the gradients.
struct Replica {
  Replica(int rank, ProcessGroup* world) {
    const at::Generator own = at::make_generator<at::CPUGeneratorImpl>(3);  // torch's one would be of all threads
    const at::Tensor shared = at::randn({40, 30}, own), norm = at::randn({7}, own), alone = at::randn({2, 5, 9}, own);
    parameters.push_back({.name = "shared.weight", .tensor = shared.clone(), .replicas = world});
    parameters.push_back({.name = "norm.weight", .tensor = norm.clone(), .replicas = world});
    parameters.push_back({.name = "expert.weight", .tensor = (world ? alone.narrow(0, rank, 1) : alone).clone()});
    for (Parameter& p : parameters) p.tensor.set_requires_grad(true);
  }

  // Rank r's part of the loss, whose gradients are (r + pass + 1) * parameter.
  at::Tensor loss(int rank, int pass) const {
    const auto half_square = [&](const at::Tensor& x) { return 0.5 * (rank + pass + 1) * x.square().sum(); };
    at::Tensor sum = half_square(parameters[0].tensor);
    if (rank == 0 && pass == 0) sum = sum + half_square(parameters[1].tensor);
    const at::Tensor& alone = parameters[2].tensor;
    return sum + half_square(alone.size(0) == 1 ? alone : alone.narrow(0, rank, 1));
  }

  std::vector<Parameter> parameters;
};

TEST(ZeroOptimizer, CountsEveryParameterOnce) {
  const Replica one(0, nullptr);
  ZeroOptimizer oracle(one.parameters, 2, {}, nullptr);
  std::vector<double> norms;
  for (int step = 0; step < 3; ++step) {
    for (int pass = 0; pass < 2; ++pass) {
      (one.loss(0, pass) + one.loss(1, pass)).backward();
      oracle.accumulate_gradients();
    }
    norms.push_back(oracle.step(settings(), kMaxNorm));
  }
  for (const int64_t stage : {0, 1, 2}) {
    run_ranks(2, 30.0, [&](ProcessGroup& world) {
      at::set_num_threads(1);
      const Replica mine(world.rank(), &world);
      ZeroOptimizer optimizer(mine.parameters, 2, {.zero_stage = stage, .reduce_bucket_size = 1300}, &world);
      for (const double norm : norms) {
        for (int pass = 0; pass < 2; ++pass) {
          mine.loss(world.rank(), pass).backward();
          EXPECT_FALSE(mine.parameters[0].tensor.grad().defined()) << "the hook has taken it";
          optimizer.accumulate_gradients();
        }
        EXPECT_NEAR(optimizer.step(settings(), kMaxNorm), norm, 1e-5 * norm);
      }
      // As in check().
      const auto expect_near = [](const at::Tensor& a, const at::Tensor& b) {
        EXPECT_LT((a - b).abs().max().item<double>(), 1e-5);
      };
      expect_near(mine.parameters[0].tensor, one.parameters[0].tensor);
      expect_near(mine.parameters[1].tensor, one.parameters[1].tensor);
      expect_near(mine.parameters[2].tensor, one.parameters[2].tensor.narrow(0, world.rank(), 1));
    });
  }
}

}  // namespace
}  // namespace coterie
