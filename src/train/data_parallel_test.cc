// Several ranks, as threads, train as one does: losses, clip norms and weights of a tiny MoE model, for every ZeRO
// stage and degree of expert parallelism, with and without accumulation, fp32 and bf16.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <ostream>
#include <tuple>

#include "comm/thread_transport.h"
#include "coterie/error.h"
#include "io/safetensors.h"
#include "train/trainer.h"
#include "train/trainer_test_support.h"

namespace coterie {
namespace {

constexpr int64_t kSteps = 50;
constexpr double kTimeout = 60.0;

struct History {
  std::vector<double> losses, balance_losses, norms;
  std::vector<std::vector<int64_t>> loads;  // per step, of the first MoE layer
  std::vector<at::Tensor> weights;          // of the end, in fp32; what every rank has whole
  double valid_loss = 0;
};

History run_steps(Trainer& trainer, int64_t until) {
  History run;
  const auto copy = [](const at::Tensor& tensor) { return tensor.detach().to(at::kFloat, false, /*copy=*/true); };
  while (trainer.state().step < until) {
    const StepMetrics m = trainer.step();
    run.losses.push_back(m.loss);
    run.balance_losses.push_back(m.balance_loss);
    run.norms.push_back(m.grad_norm);
    run.loads.push_back(m.loads.at(0).tokens_per_expert_E);
  }
  for (const Parameter& p : trainer.model().parameters()) {
    if (p.tensor.sizes() == p.logical_shape) run.weights.push_back(copy(p.tensor));
  }
  run.valid_loss = trainer.evaluate().loss;
  return run;
}

void expect_same_bits(const History& a, const History& b, const std::string& what) {
  EXPECT_EQ(a.losses, b.losses) << what;
  EXPECT_EQ(a.balance_losses, b.balance_losses) << what;
  EXPECT_EQ(a.norms, b.norms) << what;
  EXPECT_EQ(a.valid_loss, b.valid_loss) << what;
  for (size_t i = 0; i < a.weights.size(); ++i) EXPECT_TRUE(a.weights[i].equal(b.weights[i])) << what << ": " << i;
}

class DataParallelTest : public TinyCorpus {
 protected:
  RunSettings ranked(const std::string& name, const std::string& dtype, int64_t parts, int64_t stage) const {
    RunSettings s = settings(name, dtype);
    s.train.batch_size = 8;
    s.train.tokens = kSteps * 8 * 16;
    s.train.decay_tokens = s.train.tokens;
    s.train.gradient_accumulation_steps = parts;
    s.train.threads = 1;
    s.train.learning_rate = 3e-3;
    s.train.z_loss = 1e-3;
    s.parallel = {.zero_stage = stage, .reduce_bucket_size = 2000};  // several buckets, and a matrix that is larger
    return s;
  }

  // The run of every rank; they must agree to the bit.
  static History run_as(int ranks, const ModelConfig& config, const RunSettings& settings, int64_t until = kSteps) {
    std::vector<History> runs(static_cast<size_t>(ranks));
    run_ranks(ranks, kTimeout, [&](ProcessGroup& world) {
      Trainer trainer(config, settings, &world);
      runs[static_cast<size_t>(world.rank())] = run_steps(trainer, until);
    });
    for (const History& run : runs) expect_same_bits(runs[0], run, "rank");
    return runs[0];
  }
};

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

// In fp32 another layout sums the same numbers in another order: 2^-24 of a gradient, which AdamW makes at most a few
// 1e-5 of an update where the gradient is near its eps, and 24 steps add up. 1e-4 is what layouts promise. In bf16 each
// rank rounds its own gradients, 2^-9 of each, where one rank rounds their sum: the first norm differs by 2^-8 of it at
// most. Weights then round to neighbours 2^-8 apart, so that single choices of experts differ, and with them norms.
TEST_F(DataParallelTest, EqualsOneRank) {
  for (const std::string dtype : {"fp32", "bf16"}) {
    const double loss_tolerance = dtype == "fp32" ? 1e-4 : 2e-2, norm_tolerance = dtype == "fp32" ? 1e-3 : INFINITY;
    for (const int64_t parts : {1, 2}) {
      const History one = run_as(1, dropless_config(), ranked("one", dtype, parts, 0));
      for (const int ranks : {2, 4}) {
        std::vector<History> stages;
        for (const int64_t stage : {0, 1, 2}) {
          const std::string what = dtype + ", " + std::to_string(parts) + " parts, " + std::to_string(ranks) +
                                   " ranks, stage " + std::to_string(stage);
          stages.push_back(run_as(ranks, dropless_config(), ranked("many", dtype, parts, stage)));
          const History& many = stages.back();
          EXPECT_LT(largest_difference(many.losses, one.losses), loss_tolerance) << what;
          EXPECT_LT(largest_difference(many.balance_losses, one.balance_losses), loss_tolerance) << what;
          EXPECT_LT(largest_difference(many.norms, one.norms), norm_tolerance) << what;
          EXPECT_NEAR(many.norms[0], one.norms[0], one.norms[0] * (dtype == "fp32" ? 1e-5 : 1.0 / 256)) << what;
          EXPECT_NEAR(many.valid_loss, one.valid_loss, loss_tolerance) << what;
          EXPECT_EQ(many.loads[0], one.loads[0]) << what;
        }
        expect_same_bits(stages[0], stages[1], "stages 0 and 1");
        // Stage 2 sums over the ranks before it sums over the parts.
        if (parts == 1) expect_same_bits(stages[0], stages[2], "stages 0 and 2");
      }
    }
  }
}

TEST_F(DataParallelTest, ExpertsSpreadOverRanksEqualOneRank) {
  struct Layout {
    int ranks;
    std::vector<int64_t> degrees;  // of the pyramid's layers
  };
  const std::vector<Layout> layouts = {{2, {2}}, {4, {4}}, {4, {2}}, {4, {2, 4}}, {4, {1, 4}}};
  for (const float capacity_factor : {0.0f, 1.0f}) {
    const ModelConfig config = pyramid_config(capacity_factor);
    for (const int64_t parts : {1, 2}) {
      const History one = run_as(1, config, ranked("one", "fp32", parts, 0));
      for (const Layout& layout : layouts) {
        for (const int64_t stage : {0, 1, 2}) {
          RunSettings s = ranked("many", "fp32", parts, stage);
          s.parallel.experts.expert_parallel = layout.degrees;
          const History many = run_as(layout.ranks, config, s);
          const std::string what = std::to_string(layout.ranks) + " ranks, degree " +
                                   std::to_string(layout.degrees.back()) + ", " + std::to_string(parts) +
                                   " parts, stage " + std::to_string(stage) + ", capacity " +
                                   std::to_string(capacity_factor);
          EXPECT_LT(largest_difference(many.losses, one.losses), 1e-4) << what;
          EXPECT_LT(largest_difference(many.balance_losses, one.balance_losses), 1e-4) << what;
          EXPECT_NEAR(many.norms[0], one.norms[0], one.norms[0] * 1e-5) << what;
          EXPECT_NEAR(many.valid_loss, one.valid_loss, 1e-4) << what;
          EXPECT_EQ(many.loads[0], one.loads[0]) << what;
        }
      }
    }
  }
}

// More ranks than experts: in the first layer each rank has half of one. The forward pass adds in another order here,
// so that a token whose scores are nearly even may choose otherwise, and a balance loss jumps by what one of 128 is.
TEST_F(DataParallelTest, SlicedExpertsEqualOneRank) {
  for (const float capacity_factor : {0.0f, 1.0f}) {
    ModelConfig config = pyramid_config(capacity_factor);
    config.layers[0].router.num_experts = 2;
    const History one = run_as(1, config, ranked("one", "fp32", 2, 0));
    for (const int64_t stage : {0, 1, 2}) {
      RunSettings s = ranked("many", "fp32", 2, stage);
      s.parallel.experts.expert_parallel = {4, 4};
      const History many = run_as(4, config, s);
      const std::string what = "stage " + std::to_string(stage) + ", capacity " + std::to_string(capacity_factor);
      EXPECT_LT(largest_difference(many.losses, one.losses), 1e-4) << what;
      EXPECT_NEAR(many.norms[0], one.norms[0], one.norms[0] * 1e-5) << what;
      EXPECT_NEAR(many.valid_loss, one.valid_loss, 1e-4) << what;
    }
  }
}

TEST_F(DataParallelTest, AGroupOfOneChangesNoBit) {
  for (const std::string dtype : {"fp32", "bf16"}) {
    const RunSettings s = ranked("one", dtype, 2, 2);
    Trainer alone(tiny_config(), s);
    expect_same_bits(run_steps(alone, kSteps), run_as(1, tiny_config(), s), dtype);
  }
}

// The load of the whole batch so far, of all ranks: what one rank counts.
TEST_F(DataParallelTest, BalanceOverTheGlobalBatch) {
  RunSettings s = ranked("balance", "fp32", 2, 1);
  s.train.balance_loss_scope = "global_batch";
  const History one = run_as(1, dropless_config(), s), two = run_as(2, dropless_config(), s);
  EXPECT_LT(largest_difference(two.balance_losses, one.balance_losses), 1e-4);
  s.train.balance_loss_scope = "micro_batch";
  EXPECT_GT(largest_difference(run_as(2, dropless_config(), s).balance_losses, one.balance_losses), 1e-4);
}

// Saved by ranks that hold a part of the states each; continued by as many with the same bits, and by any other layout
// as one goes on with another layout (EqualsOneRank).
TEST_F(DataParallelTest, ResumesAnywhere) {
  for (const std::string dtype : {"fp32", "bf16"}) {
    const RunSettings s = ranked("saved-" + dtype, dtype, 2, 2);
    const History whole = run_as(2, dropless_config(), s);
    const std::vector<double> expected(whole.losses.begin() + kSteps / 2, whole.losses.end());
    run_ranks(2, kTimeout, [&](ProcessGroup& world) {
      Trainer trainer(dropless_config(), s, &world);
      run_steps(trainer, kSteps / 2);
      trainer.save();
      EXPECT_EQ(trainer.finish_save().empty(), world.rank() > 0);
    });
    const auto resumed = [&](int ranks, int64_t stage) {
      std::vector<double> losses;
      RunSettings other = s;
      other.parallel.zero_stage = stage;
      run_ranks(ranks, kTimeout, [&](ProcessGroup& world) {
        Trainer trainer(dropless_config(), other, &world);
        EXPECT_TRUE(trainer.resume());
        const History of_rank = run_steps(trainer, kSteps);
        if (world.rank() == 0) losses = of_rank.losses;
      });
      return losses;
    };
    EXPECT_EQ(resumed(2, 2), expected) << dtype;
    for (const auto& [ranks, stage] : {std::pair(1, 1), {2, 0}, {4, 1}, {4, 2}}) {
      EXPECT_LT(largest_difference(resumed(ranks, stage), expected), dtype == "fp32" ? 1e-4 : 2e-2)
          << dtype << ", " << ranks << " ranks, stage " << stage;
    }
  }
}

// Saved at each layout and continued at each other: the next losses are those of a run that never stopped.
TEST_F(DataParallelTest, CheckpointsFitAnyLayout) {
  const std::vector<std::tuple<std::string, int, std::vector<int64_t>, int64_t>> layouts = {
      {"one", 1, {1}, 0}, {"two", 2, {1}, 1},   {"ep2", 2, {2}, 2},
      {"ep4", 4, {4}, 1}, {"ep2x2", 4, {2}, 2}, {"pyramid", 4, {2, 4}, 1}};
  constexpr int64_t kSavedAt = 10, kUntil = 15;
  ModelConfig config = pyramid_config(1.0f);
  config.layers[0].router.num_experts = 2;  // which degree 4 cuts into slices
  const History whole = run_as(1, config, ranked("whole", "fp32", 2, 0), kUntil);
  const std::vector<double> expected(whole.losses.begin() + kSavedAt, whole.losses.end());
  for (const auto& [saved, saved_ranks, saved_degrees, saved_stage] : layouts) {
    RunSettings s = ranked(saved, "fp32", 2, saved_stage);
    s.parallel.experts.expert_parallel = saved_degrees;
    run_ranks(saved_ranks, kTimeout, [&](ProcessGroup& world) {
      Trainer trainer(config, s, &world);
      run_steps(trainer, kSavedAt);
      trainer.save();
      trainer.finish_save();
    });
    for (const auto& [loaded, ranks, degrees, stage] : layouts) {
      s.parallel.zero_stage = stage;
      s.parallel.experts.expert_parallel = degrees;
      run_ranks(ranks, kTimeout, [&](ProcessGroup& world) {
        Trainer trainer(config, s, &world);
        EXPECT_TRUE(trainer.resume());
        const History run = run_steps(trainer, kUntil);
        EXPECT_LT(largest_difference(run.losses, expected), 1e-4) << saved << " -> " << loaded;
        EXPECT_LT(largest_difference(run.norms, {whole.norms.begin() + kSavedAt, whole.norms.end()}), 1e-3);
      });
    }
  }
}

// What one rank exports is the whole model, in the parameters' own types.
TEST_F(DataParallelTest, ExportsExpertsOfAllRanks) {
  RunSettings s = ranked("export", "bf16", 1, 2);
  s.parallel.experts.expert_parallel = {2};
  std::vector<std::vector<at::Tensor>> parts(2);
  run_ranks(2, kTimeout, [&](ProcessGroup& world) {
    Trainer trainer(dropless_config(), s, &world);
    trainer.step();
    trainer.save();
    if (world.rank() == 0) trainer.export_model((dir_ / "exported").string());
    for (const Parameter& p : trainer.model().parameters()) parts[world.rank()].push_back(p.tensor.detach().clone());
  });
  LanguageModel whole(dropless_config(), at::kBFloat16, /*seed=*/0);
  whole.load(SafetensorsSource((dir_ / "exported").string()));
  for (size_t i = 0; i < whole.parameters().size(); ++i) {
    const Parameter& p = whole.parameters()[i];
    const bool shared = parts[0][i].sizes() == p.tensor.sizes();
    EXPECT_TRUE(p.tensor.equal(shared ? parts[0][i] : at::cat({parts[0][i], parts[1][i]}))) << p.name;
  }
}

TEST_F(DataParallelTest, RefusesBatchesThatDontDivide) {
  try {
    run_as(3, tiny_config(), ranked("bad", "fp32", 2, 1));
    FAIL() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(),
                 "train.batch_size: batch_size / gradient_accumulation_steps (4) is not divisible by the number of "
                 "ranks (3)");
  }
}

}  // namespace
}  // namespace coterie
