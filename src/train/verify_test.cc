// The check passes on right layouts, and finds each of the faults that distributed training is known for.
#include "train/verify.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "comm/thread_transport.h"
#include "train/trainer.h"
#include "train/trainer_test_support.h"

namespace coterie {
namespace {

class VerifyTest : public TinyCorpus {
 protected:
  struct Layout {
    int ranks = 2;
    std::vector<int64_t> degrees = {2};
    int64_t stage = 1;
    std::string dtype = "fp32";
    float capacity_factor = 0;
    int64_t first_experts = 4;  // of the pyramid's first layer
  };

  VerifyReport verify(const Layout& layout, const VerifyFaults& faults = {}) const {
    RunSettings s = settings("verify", layout.dtype);
    s.train.batch_size = 8;
    s.train.threads = 1;
    s.parallel = {.zero_stage = layout.stage, .reduce_bucket_size = 2000};
    s.parallel.experts.expert_parallel = layout.degrees;
    ModelConfig config = pyramid_config(layout.capacity_factor);
    config.layers[0].router.num_experts = layout.first_experts;
    std::vector<VerifyReport> reports(static_cast<size_t>(layout.ranks));
    run_ranks(layout.ranks, 60.0, [&](ProcessGroup& world) {
      reports[static_cast<size_t>(world.rank())] = verify_step(config, s, world, faults);
    });
    for (const VerifyReport& report : reports) {
      EXPECT_EQ(report.gradient.tensor, reports[0].gradient.tensor);
      EXPECT_EQ(report.gradient.error, reports[0].gradient.error);
      EXPECT_EQ(report.weight.error, reports[0].weight.error);
    }
    return reports[0];
  }
};

TEST_F(VerifyTest, PassesRightLayouts) {
  for (const std::string dtype : {"fp32", "bf16"}) {
    for (const int64_t stage : {0, 1, 2}) {
      for (const Layout& layout : std::vector<Layout>{{2, {1}, stage, dtype},
                                                      {2, {2}, stage, dtype, 1.0f},
                                                      {4, {2}, stage, dtype},
                                                      {4, {2, 4}, stage, dtype},
                                                      {4, {4}, stage, dtype, 0, 2}}) {  // the last in slices
        const VerifyReport report = verify(layout);
        EXPECT_TRUE(within(report, VerifyTolerance::of(dtype)))
            << layout.ranks << " ranks, stage " << stage << ", " << dtype << ": loss " << report.loss << ", gradient "
            << report.gradient.tensor << " " << report.gradient.error << ", norm " << report.norm << ", weight "
            << report.weight.tensor << " " << report.weight.error << ", uncounted " << report.uncounted.error;
      }
    }
  }
}

// Changes the gradients that a rank answers for, by logical name.
auto on_gradients(const std::function<void(const StateView&)>& change) {
  return [change](Trainer& trainer, double& /*norm*/) {
    const c10::NoGradGuard no_grad;
    for (const StateView& view : trainer.optimizer().gradient_views()) change(view);
  };
}

TEST_F(VerifyTest, FindsAGradientScaledByTheDegree) {
  const VerifyReport report = verify({}, {.before_update = on_gradients([](const StateView& view) {
                                            if (view.name.find(".experts.") != std::string::npos) view.values.mul_(2);
                                          })});
  EXPECT_NEAR(report.gradient.error, 1.0, 1e-3);
  EXPECT_NE(report.gradient.tensor.find(".experts."), std::string::npos);
}

TEST_F(VerifyTest, FindsANormCountedTwice) {
  const VerifyReport report =
      verify({}, {.before_update = [](Trainer& /*trainer*/, double& norm) { norm *= std::sqrt(2.0); }});
  EXPECT_NEAR(report.norm, std::sqrt(2.0) - 1, 1e-4);
  EXPECT_FALSE(within(report, VerifyTolerance::of("fp32")));
}

// Both ranks hold all experts; of the first one only half of the sum arrives.
TEST_F(VerifyTest, FindsAnExpertThatWasNotReduced) {
  const std::string tensor = "model.layers.1.experts.down.weight";
  const VerifyReport report =
      verify({.degrees = {1}}, {.before_update = on_gradients([&](const StateView& view) {
                                  const int64_t count = view.shape[1] * view.shape[2] - view.first_element;
                                  if (view.name == tensor && count > 0)
                                    view.values.narrow(0, 0, std::min(count, view.values.numel())).mul_(0.5);
                                })});
  EXPECT_EQ(report.gradient.tensor, tensor);
  EXPECT_GT(report.gradient.error, 0.01);
}

TEST_F(VerifyTest, FindsStaleWeightsAfterTheAllGather) {
  const std::string tensor = "model.layers.1.attention.o_proj.weight";
  for (const std::string dtype : {"fp32", "bf16"}) {
    std::vector<at::Tensor> before(2);
    const auto of = [&](const Trainer& trainer) {
      const auto& all = trainer.model().parameters();
      return std::find_if(all.begin(), all.end(), [&](const Parameter& p) { return p.name == tensor; })
          ->tensor.detach();
    };
    const VerifyReport report = verify(
        {.dtype = dtype},
        {.before_update = [&](Trainer& trainer, double& /*norm*/) { before[trainer.rank()] = of(trainer).clone(); },
         .after_update =
             [&](Trainer& trainer) {
               if (trainer.rank() == 1) of(trainer).copy_(before[1]);
             }});
    EXPECT_EQ(report.weight.tensor, tensor) << dtype;
    EXPECT_NEAR(report.weight.error, 1.0, 0.1) << dtype;
    EXPECT_LT(report.gradient.error, VerifyTolerance::of(dtype).gradient);
  }
}

TEST_F(VerifyTest, FindsADroppedBucket) {
  const VerifyReport report = verify({}, {.before_update = on_gradients([](const StateView& view) {
                                            if (view.name.find("layers.1.attention") != std::string::npos)
                                              view.values.zero_();
                                          })});
  EXPECT_NEAR(report.gradient.error, 1.0, 1e-6) << report.gradient.tensor;
  EXPECT_NE(report.gradient.tensor.find("layers.1.attention"), std::string::npos);
  EXPECT_GT(report.weight.error, 0.5);
}

}  // namespace
}  // namespace coterie
