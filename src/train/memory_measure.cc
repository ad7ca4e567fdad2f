// measure_memory(): the one half of memory_plan.h that makes tensors.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <map>

#include "comm/thread_transport.h"
#include "train/language_model.h"
#include "train/memory_plan.h"
#include "train/ops.h"
#include "train/zero_optimizer.h"

namespace coterie {
namespace {

constexpr double kTimeout = 600.0;  // of a rank for another's step
constexpr int64_t kTokens = 8;

// Of the memory behind the parameters, with what lies between them.
int64_t weight_bytes(const LanguageModel& model) {
  std::map<const void*, int64_t> storages;
  for (const Parameter& p : model.parameters()) {
    storages[p.tensor.storage().data()] = static_cast<int64_t>(p.tensor.storage().nbytes());
  }
  int64_t sum = 0;
  for (const auto& [data, nbytes] : storages) sum += nbytes;
  return sum;
}

void run_pass(const LanguageModel& model, uint64_t step) {
  const int64_t length = std::min(kTokens, model.config().max_position_embeddings);
  const at::Tensor windows = at::arange(length + 1, at::kLong).remainder(model.config().vocab_size).unsqueeze(0);
  const ForwardResult result =
      model.forward(windows.narrow(1, 0, length).contiguous(), {.training = true, .step = step});
  const at::Tensor targets = windows.narrow(1, 1, length).reshape({-1}).contiguous();
  at::Tensor loss = head_loss(result.hidden_TD, model.head(), targets, nullptr).loss;
  if (result.balance_loss.defined()) loss = loss + result.balance_loss;
  loss.backward();
}

TrainingBytes measure_step(const LanguageModel& model, const ParallelSettings& parallel, int64_t passes,
                           ProcessGroup& world) {
  ZeroOptimizer optimizer(model.parameters(), passes, parallel, &world);
  int64_t gradients = 0;
  optimizer.watch_gradients([&] { gradients = std::max(gradients, optimizer.held_bytes().gradients); });
  for (int64_t pass = 0; pass < passes; ++pass) {
    run_pass(model, static_cast<uint64_t>(pass));
    optimizer.accumulate_gradients();
  }
  TrainingBytes measured = optimizer.held_bytes();
  measured.weights = weight_bytes(model);
  measured.gradients = gradients;
  return measured;
}

}  // namespace

std::vector<std::vector<TrainingBytes>> measure_memory(const MemoryCase& layout, const std::vector<int64_t>& stages) {
  std::vector<std::vector<TrainingBytes>> measured(stages.size());
  for (auto& ranks : measured) ranks.resize(static_cast<size_t>(layout.num_ranks));
  const at::ScalarType dtype = layout.dtype == DType::kBF16 ? at::kBFloat16 : at::kFloat;
  run_ranks(static_cast<int>(layout.num_ranks), kTimeout, [&](ProcessGroup& world) {
    at::set_num_threads(1);
    const LanguageModel model(layout.config, dtype, /*seed=*/0, &world, layout.parallel.experts);
    for (size_t s = 0; s < stages.size(); ++s) {
      ParallelSettings parallel = layout.parallel;
      parallel.zero_stage = stages[s];
      measured[s][static_cast<size_t>(world.rank())] = measure_step(model, parallel, layout.passes, world);
    }
  });
  return measured;
}

}  // namespace coterie
