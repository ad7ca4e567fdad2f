// Checkpoints between layouts: what ranks saved in one cut of rows, flat ranges and slices is loaded in another; and
// failures in the background.
#include "train/checkpoint.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "comm/process_group.h"
#include "comm/thread_transport.h"
#include "io/test_files.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kRows = 6, kCols = 5, kElements = kRows * kCols;

// Rank r holds the elements [at[r], at[r + 1]) of this order.
struct Cut {
  std::vector<int64_t> at;
  ElementOrder order = {};
  int ranks() const { return static_cast<int>(at.size()) - 1; }
};

// By hand: [6, 5] slice by slice.
at::Tensor in_order(const at::Tensor& all, const ElementOrder& order) {
  const at::Tensor rows = all.view({kRows, kCols});
  if (order == ElementOrder{10, 5}) return at::cat({rows[0], rows[2], rows[4], rows[1], rows[3], rows[5]});
  if (order == ElementOrder{5, 1}) return rows.t().reshape({-1});  // by columns
  EXPECT_EQ(order, ElementOrder{});
  return all;
}

class TrainCheckpointTest : public TemporaryDirectoryTest {
 protected:
  void SetUp() override {
    TemporaryDirectoryTest::SetUp();
    settings_.train.output_dir = directory().string();
    settings_.train.batch_size = 4;
    settings_.data.sequence_length = 8;
    config_.vocab_size = 7, config_.hidden_size = 12, config_.num_heads = config_.num_kv_heads = 6;
    config_.head_dim = 2, config_.max_position_embeddings = 9;
    config_.layers.resize(1);
    config_.layers[0].intermediate_size = 5;
  }

  // A tensor that is cut and one that every rank holds whole; filled when `filled`.
  static std::vector<StateView> views(const Cut& cut, int rank, bool filled, at::ScalarType dtype = at::kFloat) {
    const auto r = static_cast<size_t>(rank);
    const at::Tensor all = in_order(at::arange(kElements, at::kFloat).to(dtype), cut.order);
    const at::Tensor whole = at::arange(3, at::kFloat) + 100;
    const auto own = [&](const at::Tensor& t) { return filled ? t.clone() : at::zeros_like(t); };
    return {{"cut", {kRows, kCols}, cut.at[r], own(all.slice(0, cut.at[r], cut.at[r + 1])), true, cut.order},
            {"whole", {3}, 0, own(whole), rank == 0}};
  }

  void save(const Cut& cut, int64_t step) {
    run_ranks(cut.ranks(), 20, [&](ProcessGroup& world) {
      CheckpointSaver saver(config_, settings_, &world);
      std::vector<StateView> held = views(cut, world.rank(), true);
      saver.start({.step = step, .train_seconds = 1.5}, held);
      for (StateView& view : held) view.values.zero_();  // training goes on
      EXPECT_EQ(saver.finish().empty(), world.rank() != 0);
    });
  }

  void expect_loads(const Cut& cut, int64_t step, at::ScalarType dtype = at::kFloat) {
    run_ranks(cut.ranks(), 20, [&](ProcessGroup& world) {
      const std::vector<StateView> expected = views(cut, world.rank(), true, dtype);
      const std::vector<StateView> got = views(cut, world.rank(), false, dtype);
      const auto state = load_latest_checkpoint(config_, settings_, got, &world);
      ASSERT_TRUE(state);
      EXPECT_EQ(state->step, step);
      EXPECT_EQ(state->train_seconds, 1.5);
      for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i].values.equal(expected[i].values)) << got[i].name;
    });
  }

  std::string refusal(const std::vector<StateView>& wanted) {
    return message<Error>([&] { load_latest_checkpoint(config_, settings_, wanted); },
                          directory().string() + "/checkpoints/");
  }

  ModelConfig config_;
  RunSettings settings_;
};

TEST_F(TrainCheckpointTest, EveryLayoutLoadsEveryOther) {
  const ElementOrder half_rows{10, 5}, columns{5, 1};
  const std::vector<Cut> cuts = {{{0, 30}},
                                 {{0, 15, 30}},
                                 {{0, 10, 30}},
                                 {{0, 7, 7, 23, 30}},
                                 {{0, 30}, half_rows},
                                 {{0, 7, 15, 30}, columns},
                                 {{0, 12, 30}, half_rows}};
  int64_t step = 0;
  for (const Cut& saved : cuts) {
    save(saved, ++step);
    for (const Cut& loaded : cuts) expect_loads(loaded, step);
    expect_loads({{0, 11, 30}}, step, at::kBFloat16);  // integers below 256 are exact
  }
}

TEST_F(TrainCheckpointTest, NamesWhatDoesNotArriveOnce) {
  EXPECT_FALSE(load_latest_checkpoint(config_, settings_, {}));
  save({{0, 15, 30}}, 3);
  std::vector<StateView> wanted = views({{0, 30}}, 0, false);
  EXPECT_EQ(refusal(wanted), "");
  wanted.push_back({"more", {1}, 0, at::zeros({1})});
  EXPECT_EQ(refusal(wanted), "step-00000003: tensor 'more': is missing");
  wanted.resize(1);
  EXPECT_EQ(refusal(wanted), "step-00000003: tensor 'whole': is in no part of the model");
  wanted[0].shape = {kCols, kRows};
  EXPECT_EQ(refusal(wanted), "step-00000003: tensor 'cut': has shape [6,5], the model's is [5,6]");
  wanted = views({{0, 29}}, 0, false);
  EXPECT_EQ(refusal(wanted), "step-00000003: of the run's layout: tensor 'cut': elements 29 to 29 are missing");
  wanted = views({{0, 30}}, 0, false);
  settings_.train.seed = 9;
  EXPECT_EQ(refusal(wanted),
            "step-00000003/manifest.json: state: train.seed: the checkpoint was made with '0', the run has 9");
  config_.layers[0].intermediate_size = 6;
  EXPECT_EQ(refusal(wanted),
            "step-00000003/manifest.json: state: model: the checkpoint is of another model configuration");
}

TEST_F(TrainCheckpointTest, TellsAFailureOfTheBackgroundOnce) {
  CheckpointSaver saver(config_, settings_);
  const std::vector<StateView> hole = views({{0, 20}}, 0, true);
  saver.start({.step = 1}, hole);
  const std::string aside = directory().string() + "/checkpoints/tmp-step-00000001";
  EXPECT_EQ(corrupt_message([&] { saver.finish(); }, aside), ": tensor 'cut': elements 20 to 29 are missing");
  saver.check();
  saver.start({.step = 1}, hole);
  const auto check_until_it_throws = [&] {
    while (true) saver.check();
  };
  EXPECT_EQ(corrupt_message(check_until_it_throws, aside), ": tensor 'cut': elements 20 to 29 are missing");
  saver.start({.step = 2}, views({{0, 30}}, 0, true));
  EXPECT_EQ(fs::path(saver.finish()).filename(), "step-00000002");
}

}  // namespace
}  // namespace coterie
