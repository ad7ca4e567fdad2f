#include "train/settings.h"

#include <gtest/gtest.h>

#include <set>

#include "coterie/error.h"

namespace coterie {
namespace {

TEST(LearningRate, WarmsUpThenFallsAlongACosine) {
  const TrainSettings settings{
      .learning_rate = 1.0, .min_learning_rate = 0.1, .warmup_tokens = 100, .decay_tokens = 1100};
  EXPECT_DOUBLE_EQ(learning_rate_at(settings, 50), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate_at(settings, 100), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(settings, 600), 0.55);
  EXPECT_NEAR(learning_rate_at(settings, 1100), 0.1, 1e-12);
  EXPECT_NEAR(learning_rate_at(settings, 5000), 0.1, 1e-12);
}

TEST(LearningRate, StartsAtTheTopWithoutWarmUp) {
  EXPECT_NEAR(learning_rate_at({.learning_rate = 1.0, .min_learning_rate = 0.0, .decay_tokens = 1 << 20}, 1), 1.0,
              1e-6);
}

TEST(DistillSettings, StopsAtAFractionOrAStep) {
  EXPECT_EQ((DistillSettings{.stop_at = 0.7}).stop_step(100), 70);
  EXPECT_EQ((DistillSettings{.stop_at = 1.0}).stop_step(100), 100);
  EXPECT_EQ((DistillSettings{.stop_at = 30}).stop_step(100), 30);
}

void expect_refused(const std::string& text, const std::string& message) {
  try {
    RunSettings::from_json(text);
    FAIL() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(error.what(), message);
  }
}

TEST(RunSettings, NamesWhatIsWrong) {
  expect_refused("[]", "settings: not a JSON object");
  expect_refused(R"({"train": {}})", "data: missing");
  expect_refused(R"({"data": {"path": "x", "sequence_length": "long"}})",
                 "data.sequence_length: wrong type (\"long\")");
  expect_refused(R"({"data": {"path": "x", "sequence_length": 0}})", "data.sequence_length: must be positive (0)");
  expect_refused(R"({"data": {"path": "x", "sequence_length": 1, "lenght": 2}})", "data.lenght: unknown key (2)");
}

}  // namespace
}  // namespace coterie
