// Whole runs on a small random corpus: the data order, and that a run stopped and resumed anywhere
// continues with the same bits.
#include "train/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <numeric>
#include <set>

#include "coterie/error.h"
#include "io/safetensors.h"
#include "train/trainer_test_support.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

class TrainerTest : public TinyCorpus {};

std::vector<double> run(Trainer& trainer, int64_t until) {
  std::vector<double> losses;
  while (trainer.state().step < until) {
    const StepMetrics m = trainer.step();
    losses.insert(losses.end(), {m.loss, m.balance_loss, m.grad_norm});
  }
  return losses;
}

TEST_F(TrainerTest, ResumedRunHasTheSameBits) {
  for (const char* dtype : {"fp32", "bf16"}) {
    const std::string whole_name = std::string("whole-") + dtype, cut_name = std::string("cut-") + dtype;
    Trainer whole(tiny_config(), settings(whole_name, dtype));
    const std::vector<double> expected = run(whole, 12);
    std::vector<double> actual;
    for (int64_t until : {3, 8, 12}) {  // three sittings
      Trainer trainer(tiny_config(), settings(cut_name, dtype));
      EXPECT_EQ(trainer.resume(), until > 3);
      const std::vector<double> part = run(trainer, until);
      actual.insert(actual.end(), part.begin(), part.end());
      trainer.save();
      trainer.finish_save();
    }
    EXPECT_EQ(actual, expected) << dtype;
    EXPECT_LT(expected[expected.size() - 3], expected[0]) << "the loss falls";
    Trainer again(tiny_config(), settings(cut_name, dtype));
    EXPECT_TRUE(again.resume());
    EXPECT_EQ(again.evaluate().loss, whole.evaluate().loss);
    EXPECT_TRUE(again.finished());
  }
}

TEST_F(TrainerTest, GradientAccumulationChangesNothingButRounding) {
  // Without capacity: places are counted per micro-batch.
  ModelConfig config = tiny_config();
  config.layers[1].router.capacity_factor = 0;
  RunSettings one = settings("one"), two = settings("two");
  one.train.balance_loss = two.train.balance_loss = 0;  // a product of means over the micro-batch
  one.train.gradient_accumulation_steps = 1;
  Trainer a(config, one), b(config, two);
  // Both sum the same 64 token gradients in another order: 64 * 2^-24 relative, grown over a step.
  EXPECT_NEAR(a.step().grad_norm, b.step().grad_norm, 1e-4);
  EXPECT_NEAR(a.step().loss, b.step().loss, 1e-4);
}

TEST_F(TrainerTest, RandomChoicesDontDependOnAccumulation) {
  ModelConfig config = tiny_config();
  RouterConfig& router = config.layers[1].router;
  router.capacity_factor = 0;  // places are counted per micro-batch
  router.jitter = 0.2f, router.choice_noise = ChoiceNoise::kRSample;
  RunSettings one = settings("one"), two = settings("two");
  one.train.balance_loss = two.train.balance_loss = 0;
  one.train.gradient_accumulation_steps = 1;
  Trainer a(config, one), b(config, two);
  const StepMetrics of_a = a.step(), of_b = b.step();
  EXPECT_EQ(of_a.loads[0].tokens_per_expert_E, of_b.loads[0].tokens_per_expert_E);
  EXPECT_NEAR(of_a.grad_norm, of_b.grad_norm, 1e-4);  // as above
  router.choice_noise = ChoiceNoise::kNone;
  EXPECT_NE(Trainer(config, one).step().loads[0].tokens_per_expert_E, of_a.loads[0].tokens_per_expert_E);
}

// With the load of the whole batch, the last part's loss is E * sum f p with f of all parts.
TEST_F(TrainerTest, BalanceOverTheGlobalBatch) {
  RunSettings micro = settings("micro"), global = settings("global");
  global.train.balance_loss_scope = "global_batch";
  const double of_parts = Trainer(tiny_config(), micro).step().balance_loss;
  const double of_batch = Trainer(tiny_config(), global).step().balance_loss;
  EXPECT_NE(of_parts, of_batch);
  micro.train.gradient_accumulation_steps = global.train.gradient_accumulation_steps = 1;
  EXPECT_EQ(Trainer(tiny_config(), micro).step().balance_loss, Trainer(tiny_config(), global).step().balance_loss);
}

TEST_F(TrainerTest, CountsTheLoadOfEveryMoeLayer) {
  ModelConfig config = tiny_config();
  config.layers.push_back(config.layers[1]);
  config.layers[2].router = {.num_experts = 8, .chooser = Chooser::kExperts, .capacity_factor = 1.0f};
  const StepMetrics metrics = Trainer(config, settings("load")).step();
  ASSERT_EQ(metrics.loads.size(), 2u);
  int64_t kept = 0;
  for (int64_t tokens : metrics.loads[0].tokens_per_expert_E) kept += tokens;
  EXPECT_NEAR(metrics.loads[0].dropped, 1.0 - static_cast<double>(kept) / 64, 1e-12);
  EXPECT_GT(metrics.loads[0].dropped, 0);
  // Two parts of 32 tokens, of which each expert takes 32 / 8.
  EXPECT_EQ(metrics.loads[1].tokens_per_expert_E, std::vector<int64_t>(8, 8));
  EXPECT_EQ(metrics.loads[1].max_violation, 0);
  EXPECT_NEAR(metrics.dropped, (64.0 - static_cast<double>(kept)) / 128, 1e-12);
}

TEST_F(TrainerTest, EvaluationHasItsOwnCapacity) {
  ModelConfig config = tiny_config();
  const double dropless = Trainer(config, settings("eval")).evaluate().loss;
  config.layers[1].router.capacity_factor = 0.5f;  // of training
  EXPECT_EQ(Trainer(config, settings("eval")).evaluate().loss, dropless);
  config.layers[1].router.eval_capacity_factor = 0.25f;
  EXPECT_NE(Trainer(config, settings("eval")).evaluate().loss, dropless);
}

// The bias moves by the rate and against the load, survives a checkpoint and an export, and is no business
// of the optimizer.
TEST_F(TrainerTest, ChoiceBiasFollowsTheLoad) {
  const std::string name = "model.layers.1.router.choice_bias";
  ModelConfig config = tiny_config();
  config.layers[1].router.choice_bias = true;
  RunSettings s = settings("bias");
  s.train.choice_bias_rate = 0.25;  // far more than AdamW's 1e-2
  const auto bias_of = [&](const Trainer& trainer) {
    for (const Parameter& p : trainer.model().parameters()) {
      if (p.name == name) return std::vector<float>(p.tensor.data_ptr<float>(), p.tensor.data_ptr<float>() + 4);
    }
    return std::vector<float>();
  };
  Trainer trainer(config, s);
  EXPECT_EQ(bias_of(trainer), std::vector<float>(4));
  config.layers[1].router.capacity_factor = 0;  // so that kept choices are all choices
  Trainer dropless(config, s);
  const std::vector<int64_t> load_E = dropless.step().loads[0].tokens_per_expert_E;
  for (size_t e = 0; e < 4; ++e) {
    const float expected = load_E[e] < 16 ? 0.25f : load_E[e] > 16 ? -0.25f : 0.0f;  // 64 choices of 4 experts
    EXPECT_EQ(bias_of(dropless)[e], expected) << load_E[e];
  }
  run(trainer, 3);
  trainer.save();
  trainer.finish_save();
  Trainer resumed(trainer.model().config(), s);
  resumed.resume();
  EXPECT_EQ(bias_of(resumed), bias_of(trainer));
  trainer.export_model((dir_ / "bias/model").string());
  std::vector<float> exported(4);
  SafetensorsSource((dir_ / "bias/model").string()).read(name, exported.data());
  EXPECT_EQ(exported, bias_of(trainer));
  EXPECT_NE(exported, std::vector<float>(4));
}

TEST_F(TrainerTest, KeepsTheNewestCheckpoints) {
  Trainer trainer(tiny_config(), settings("keep"));
  for (int i = 0; i < 4; ++i) {
    trainer.step();
    trainer.save();
  }
  EXPECT_EQ(trainer.finish_save(), dir_ / "keep/checkpoints/step-00000004");
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir_ / "keep/checkpoints")) names.insert(entry.path().filename());
  EXPECT_EQ(names, (std::set<std::string>{"latest", "step-00000003", "step-00000004"}));
}

TEST_F(TrainerTest, DistillationStopsOnSchedule) {
  Trainer teacher(tiny_config(), settings("teacher"));
  run(teacher, 12);
  teacher.save();
  teacher.export_model((dir_ / "teacher/model").string());
  ModelConfig student = tiny_config();
  student.layers.erase(student.layers.begin());
  RunSettings s = settings("student");
  s.distill = DistillSettings{.teacher = (dir_ / "teacher/model").string(), .stop_at = 0.5, .drop_layers = {0}};
  Trainer trainer(student, s);
  for (int i = 0; i < 12; ++i) EXPECT_EQ(trainer.step().kl_loss > 0, i < 6) << i;
}

TEST_F(TrainerTest, EveryEpochVisitsEveryWindowOnce) {
  const PackedDataset data((dir_ / "data").string(), "train", 16, 5);
  std::vector<int64_t> first, second;
  for (int64_t i = 0; i < data.num_windows(); ++i) {
    first.push_back(data.window_at(i));
    second.push_back(data.window_at(data.num_windows() + i));
  }
  EXPECT_NE(first, second);
  std::vector<int64_t> all(static_cast<size_t>(data.num_windows()));
  std::iota(all.begin(), all.end(), 0);
  EXPECT_NE(first, all);
  std::sort(first.begin(), first.end());
  std::sort(second.begin(), second.end());
  EXPECT_EQ(first, all);
  EXPECT_EQ(second, all);
}

TEST_F(TrainerTest, RefusesWhatDoesNotFit) {
  RunSettings s = settings("bad");
  s.data.sequence_length = 64;
  EXPECT_THROW(Trainer(tiny_config(), s), InvalidArgument);
  ModelConfig small = tiny_config();
  small.vocab_size = 60;
  EXPECT_THROW(Trainer(small, settings("bad")), InvalidArgument);
  ModelConfig windowed = tiny_config();
  windowed.layers.back().window = 3;
  const std::string field = "layers[" + std::to_string(windowed.layers.size() - 1) + "].window";
  try {
    Trainer(windowed, settings("bad"));
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()), "model: " + field + ": 3 is not trained");
  }
}

}  // namespace
}  // namespace coterie
