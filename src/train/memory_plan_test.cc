// What is counted from shapes against the bytes of the tensors that real ranks hold.
#include "train/memory_plan.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>

#include "comm/thread_transport.h"
#include "coterie/error.h"
#include "train/language_model.h"
#include "train/zero_optimizer.h"

namespace coterie {

void PrintTo(const TrainingBytes& b, std::ostream* out) {  // found by gtest
  *out << "weights " << b.weights << ", gradients " << b.gradients << ", masters " << b.masters << ", moments "
       << b.moments;
}

namespace {

constexpr double kTimeout = 60.0;

// Parameters of all ranks, of pairs and of one rank alone, of both types, smaller and larger than a bucket.
std::vector<Parameter> make_parameters(ProcessGroup& world, ProcessGroup& pair) {
  std::vector<Parameter> made;
  const std::vector<ProcessGroup*> groups = {&world, &pair, nullptr};
  for (int i = 0; i < 24; ++i) {
    const at::ScalarType type = i % 5 == 1 ? at::kFloat : at::kBFloat16;
    const at::Tensor values = at::ones({i % 7 == 3 ? 3000 : 17 * i + 1}, type);
    made.push_back({.name = std::to_string(i), .tensor = values.set_requires_grad(i % 11 != 10)});
    made.back().replicas = groups[static_cast<size_t>(i * i % 3 + (i % 4 == 0))];
  }
  return made;
}

std::vector<SizedParameter> sizes_of(const std::vector<Parameter>& parameters, const ProcessGroup& world) {
  std::vector<SizedParameter> sizes;
  for (const Parameter& p : parameters) {
    const bool fp32 = p.tensor.scalar_type() == at::kFloat;
    sizes.push_back({p.tensor.numel(), fp32 ? DType::kF32 : DType::kBF16, p.tensor.requires_grad()});
    if (p.replicas) sizes.back().replicas = {p.replicas == &world ? 0 : 1, p.replicas->size(), p.replicas->rank()};
  }
  return sizes;
}

// A step whose backward passes finish the parameters one after the other, the last first.
TrainingBytes run_step(const std::vector<Parameter>& parameters, const ParallelSettings& parallel, int64_t passes,
                       ProcessGroup& world) {
  ZeroOptimizer optimizer(parameters, passes, parallel, &world);
  int64_t peak = 0;
  optimizer.watch_gradients([&] { peak = std::max(peak, optimizer.held_bytes().gradients); });
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (size_t i = parameters.size(); i-- > 0;) {
      if (parameters[i].tensor.requires_grad()) parameters[i].tensor.sum().backward();
    }
    optimizer.accumulate_gradients();
  }
  TrainingBytes held = optimizer.held_bytes();
  held.gradients = peak;
  optimizer.step(std::vector<AdamWSettings>(parameters.size()), 0.0);
  return held;
}

TEST(MemoryPlan, IsWhatTheOptimizerHolds) {
  run_ranks(4, kTimeout, [](ProcessGroup& world) {
    at::set_num_threads(1);
    const auto pair = world.split(world.rank() % 2, world.rank(), "pair");
    for (const int64_t stage : {0, 1, 2}) {
      for (const int64_t bucket_size : {1, 500, 4000}) {
        for (const int64_t passes : {1, 2, 4}) {
          const std::vector<Parameter> parameters = make_parameters(world, *pair);
          const ParallelSettings parallel{.zero_stage = stage, .reduce_bucket_size = bucket_size};
          const TrainingBytes planned = planned_bytes(sizes_of(parameters, world), parallel, passes);
          EXPECT_EQ(run_step(parameters, parallel, passes, world), planned)
              << "stage " << stage << ", buckets of " << bucket_size << ", passes " << passes;
        }
      }
    }
  });
}

// A pyramid with a fixed MLP, and everything else that a layer may have.
ModelConfig pyramid() {
  ModelConfig c;
  c.vocab_size = 61;
  c.hidden_size = 24;
  c.num_heads = c.num_kv_heads = 3;
  c.head_dim = 8;
  c.max_position_embeddings = 32;
  c.mlp_bias = true;
  c.layers.resize(3);
  c.layers[0] = {.intermediate_size = 32};
  c.layers[1] = {.expert_intermediate_size = 40, .router = {.num_experts = 2, .top_k = 1}};
  c.layers[2] = {.intermediate_size = 32,
                 .expert_intermediate_size = 16,
                 .residual = ResidualKind::kLearned,
                 .router = {.num_experts = 4, .top_k = 2, .choice_bias = true}};
  return c;
}

int64_t largest_bucket(const std::vector<SizedParameter>& parameters, int64_t bucket_size) {
  int64_t largest = 0;
  for (const ZeroBucket& bucket : zero_buckets(parameters, bucket_size)) largest = std::max(largest, bucket.size);
  return largest;
}

// Autograd finishes the parameters of a layer in its own order, which moves the peak of the gradients by less than the
// buckets that are open at once hold: one of each type and of each group, here four.
TEST(MemoryPlan, IsWhatAModelHolds) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t ranks : {1, 2, 4}) {
      for (const std::vector<int64_t>& degrees : {std::vector<int64_t>{0}, {1}, {2, 1}, {4}}) {
        if (degrees[0] > ranks) continue;  // 4 cuts the first two experts into slices
        MemoryCase layout{.config = pyramid(), .dtype = dtype, .num_ranks = ranks};
        layout.parallel.experts.expert_parallel = degrees;
        layout.parallel.reduce_bucket_size = 1500;
        const auto measured = measure_memory(layout, {0, 1, 2});
        for (const int64_t stage : {0, 1, 2}) {
          layout.parallel.zero_stage = stage;
          std::vector<TrainingBytes> planned = plan_memory(layout);
          ASSERT_EQ(planned.size(), static_cast<size_t>(ranks));
          for (size_t rank = 0; rank < planned.size(); ++rank) {
            TrainingBytes held = measured[static_cast<size_t>(stage)][rank];
            const int64_t open = largest_bucket(parameters_of_rank(layout, static_cast<int64_t>(rank)), 1500);
            EXPECT_NEAR(held.gradients, planned[rank].gradients, ranks == 1 ? 0 : 4.0 * 4.0 * open);
            held.gradients = planned[rank].gradients;
            EXPECT_EQ(held, planned[rank]) << "ranks " << ranks << ", stage " << stage << ", rank " << rank;
          }
        }
      }
    }
  }
}

TEST(MemoryPlan, RefusesDegreesThatCannotBe) {
  MemoryCase layout{.config = pyramid(), .num_ranks = 4};
  layout.parallel.experts.expert_parallel = {3};
  EXPECT_THROW(plan_memory(layout), InvalidArgument);
}

}  // namespace
}  // namespace coterie
