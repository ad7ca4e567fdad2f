// Training with experts that are cut into slices: the optimizer at every ZeRO stage against one rank, and checkpoints
// between layouts, to the bit.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "comm/thread_transport.h"
#include "io/test_files.h"
#include "train/checkpoint.h"
#include "train/language_model.h"
#include "train/zero_optimizer.h"

namespace coterie {
namespace {

constexpr int64_t kSequences = 8, kLength = 16, kSteps = 3;
constexpr double kLearningRate = 0.01, kEps = 0.01, kTimeout = 60.0;

// Two experts in each layer, gated and with biases; the second layer has a fixed MLP beside them.
ModelConfig two_experts() {
  ModelConfig c;
  c.vocab_size = 61;
  c.hidden_size = 24;
  c.num_heads = c.num_kv_heads = 3;
  c.head_dim = 8;
  c.max_position_embeddings = 32;
  c.initializer_range = 0.2f;
  c.mlp_bias = true;
  c.layers.resize(2);
  for (LayerConfig& layer : c.layers)
    layer = {.expert_intermediate_size = 16, .router = {.num_experts = 2, .top_k = 2}};
  c.layers[1].intermediate_size = 16;
  c.layers[1].residual = ResidualKind::kLearned;
  return c;
}

struct Layout {
  int ranks = 1;
  std::vector<int64_t> degrees = {1};
  int64_t stage = 0;

  std::string text() const {
    return std::to_string(ranks) + " ranks, degree " + std::to_string(degrees[0]) + ", stage " + std::to_string(stage);
  }
};

// Halves of experts, on one rank each or on two; halves in one layer alone; quarters; whole experts; one rank.
const std::vector<Layout> kLayouts = {{4, {4}, 0}, {4, {4}, 1},    {4, {4}, 2}, {8, {4}, 0}, {8, {4}, 1},
                                      {8, {4}, 2}, {4, {4, 2}, 2}, {8, {8}, 1}, {2, {1}, 2}, {1}};

// [sequences, length + 1], the same from every thread.
at::Tensor tokens_of_step(int64_t step) {
  const at::Tensor count = at::arange(kSequences * (kLength + 1));
  return (count * count * 7 + count * 17 + step * 29).remainder(61).view({kSequences, kLength + 1});
}

// What one rank trains with. The arguments outlive it, as the members do each other.
struct Rank {
  Rank(ProcessGroup& world, const Layout& layout, uint64_t seed)
      : group(world.size() > 1 ? &world : nullptr),
        parallel{.zero_stage = layout.stage, .reduce_bucket_size = 1000},
        model(two_experts(), at::kFloat, seed, group, {.expert_parallel = layout.degrees}),
        optimizer(model.parameters(), 1, parallel, group) {
    at::set_num_threads(1);
  }

  double step(int64_t index) {
    const int64_t size = group ? group->size() : 1, rank = group ? group->rank() : 0, count = kSequences / size;
    const at::Tensor windows = tokens_of_step(index).narrow(0, rank * count, count);
    const ForwardResult result = model.forward(windows.narrow(1, 0, kLength).contiguous(),
                                               {.training = true, .seed = 3, .first_token = rank * count * kLength});
    const at::Tensor targets = windows.narrow(1, 1, kLength).reshape({-1});
    const HeadLoss head = head_loss(result.hidden_TD, model.head(), targets, nullptr);
    ((head.loss + 0.1 * result.balance_loss) / static_cast<double>(size)).backward();
    optimizer.accumulate_gradients();
    const AdamWSettings settings{.learning_rate = kLearningRate, .eps = kEps};
    return optimizer.step(std::vector(model.parameters().size(), settings), /*max_grad_norm=*/1.0);
  }

  ProcessGroup* group;
  ParallelSettings parallel;
  LanguageModel model;
  ZeroOptimizer optimizer;
};

// Logical tensors from the views of all ranks; NaN where none has an element.
class Assembly {
 public:
  void add(const std::vector<StateView>& views) {
    const std::lock_guard lock(mutex_);
    for (const StateView& view : views) {
      at::Tensor& whole = tensors_[view.name];
      if (!whole.defined()) whole = at::full(view.shape, NAN);
      const at::Tensor flat = whole.view({-1}), own = view.values.view({-1});
      int64_t done = 0;
      for_each_run(view.order, flat.numel(), view.first_element, own.numel(), [&](int64_t first, int64_t count) {
        flat.narrow(0, first, count).copy_(own.narrow(0, done, count));
        done += count;
      });
    }
  }

  const std::map<std::string, at::Tensor>& tensors() const { return tensors_; }

 private:
  std::mutex mutex_;
  std::map<std::string, at::Tensor> tensors_;
};

void expect_equal(const Assembly& a, const Assembly& b, const std::string& what) {
  ASSERT_EQ(a.tensors().size(), b.tensors().size()) << what;
  for (const auto& [name, values] : b.tensors())
    EXPECT_TRUE(values.equal(a.tensors().at(name))) << what << ": " << name;
}

struct Trained {
  std::vector<double> norms;
  Assembly state;
};

void train(const Layout& layout, Trained& trained) {
  run_ranks(layout.ranks, kTimeout, [&](ProcessGroup& world) {
    Rank rank(world, layout, 11);
    std::vector<double> norms;
    for (int64_t i = 0; i < kSteps; ++i) norms.push_back(rank.step(i));
    trained.state.add(rank.optimizer.state_views());
    if (world.rank() == 0) trained.norms = norms;
  });
}

// Gradients, whose norm is clipped to 1, differ by 3e-5 of the largest at most (expert_parallel_test.cc), and AdamW's
// update by at most 1 / eps of that, times the learning rate; in each of three steps.
TEST(ExpertSlices, TrainAsOneRank) {
  constexpr double kTolerance = kSteps * kLearningRate * 3e-5 / kEps;
  Trained one;
  train({1}, one);
  std::map<std::string, const Trained*> of_layout;
  std::vector<Trained> all(kLayouts.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Layout& layout = kLayouts[i];
    train(layout, all[i]);
    EXPECT_NEAR(all[i].norms[0], one.norms[0], 3e-5 * one.norms[0]) << layout.text();
    for (const auto& [name, values] : one.state.tensors()) {
      const at::Tensor& many = all[i].state.tensors().at(name);
      EXPECT_LE((many - values).abs().max().item<double>(), kTolerance) << layout.text() << ": " << name;
    }
  }
  for (const size_t first : {0, 3}) {
    expect_equal(all[first + 1].state, all[first].state, "stages 0 and 1");
    expect_equal(all[first + 2].state, all[first].state, "stages 0 and 2");
  }
}

class SlicedCheckpointTest : public TemporaryDirectoryTest {
 protected:
  void SetUp() override {
    TemporaryDirectoryTest::SetUp();
    settings_.train.output_dir = directory().string();
  }
  RunSettings settings_;
};

TEST_F(SlicedCheckpointTest, EveryLayoutLoadsEveryOther) {
  for (size_t i = 0; i < kLayouts.size(); ++i) {
    Assembly saved;
    const auto step = static_cast<int64_t>(i + 1);
    run_ranks(kLayouts[i].ranks, kTimeout, [&](ProcessGroup& world) {
      Rank rank(world, kLayouts[i], 11);
      rank.step(0);
      saved.add(rank.optimizer.state_views());
      CheckpointSaver saver(two_experts(), settings_, rank.group);
      saver.start({.step = step}, rank.optimizer.state_views());
      saver.finish();
      world.barrier("saved");
    });
    for (const Layout& layout : kLayouts) {
      Assembly loaded;
      run_ranks(layout.ranks, kTimeout, [&](ProcessGroup& world) {
        Rank rank(world, layout, 12);
        const auto state = load_latest_checkpoint(two_experts(), settings_, rank.optimizer.state_views(), rank.group);
        ASSERT_TRUE(state);
        EXPECT_EQ(state->step, step);
        loaded.add(rank.optimizer.state_views());
      });
      expect_equal(loaded, saved, kLayouts[i].text() + " to " + layout.text());
    }
  }
}

}  // namespace
}  // namespace coterie
