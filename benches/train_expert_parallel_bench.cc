// One MoE layer whose experts are spread over ranks, with and without the exchange of one half of the tokens behind the
// experts of the other (ExpertRanks::parts): median milliseconds of a forward and of a backward pass, and what of it
// two parts take.
//
//   train_expert_parallel_bench [ranks = 2]                      ranks are threads, with one thread each
//   mpirun -n 2 train_expert_parallel_bench LIBCOTERIE_MPI.SO    ranks are processes
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "comm/mpi_transport.h"
#include "comm/thread_transport.h"
#include "train/expert_layout.h"
#include "train/ops.h"

namespace coterie {
namespace {

constexpr int64_t kRounds = 15;

struct Shape {
  int64_t D, F, num_experts, top_k;
};

struct Milliseconds {
  double forward, backward;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

class Layer {
 public:
  Layer(ProcessGroup& world, const Shape& shape, at::ScalarType dtype, int64_t tokens) : world_(world) {
    const int64_t L = shape.num_experts / world.size();
    ranks_ = {.num_experts = L, .group = &world, .label = "bench"};
    ranks_.exchange = std::make_unique<AllToAll>(world, world.size(), AllToAllAlgorithm::kFlat, LinkModel{}, 0);
    const auto leaf = [&](at::IntArrayRef sizes) { return at::full(sizes, 0.01).to(dtype).set_requires_grad(true); };
    experts_ = {.up_EUD = leaf({L, 2 * shape.F, shape.D}), .down_EDF = leaf({L, shape.D, shape.F})};
    x_TD_ = at::ones({tokens, shape.D}).set_requires_grad(true);
    // Every expert has as many rows as any other.
    ids_TK_ = (at::arange(tokens * shape.top_k) + world.rank()).remainder(shape.num_experts).view({tokens, -1});
    weights_TK_ = at::full({tokens, shape.top_k}, 0.5).set_requires_grad(true);
  }

  // Of one pass with so many parts, of the slowest rank.
  Milliseconds measure(int64_t parts) {
    ranks_.parts = parts;
    world_.barrier("round");
    const auto start = std::chrono::steady_clock::now();
    const at::Tensor out = experts_of_ranks(x_TD_, ids_TK_, weights_TK_, experts_, Activation::kSilu, true, ranks_);
    world_.barrier("forward");
    const auto middle = std::chrono::steady_clock::now();
    out.backward(at::ones_like(out));
    world_.barrier("backward");
    const auto end = std::chrono::steady_clock::now();
    for (const at::Tensor& leaf : {x_TD_, weights_TK_, experts_.up_EUD, experts_.down_EDF}) leaf.mutable_grad().reset();
    const auto ms = [](auto duration) { return std::chrono::duration<double, std::milli>(duration).count(); };
    return {ms(middle - start), ms(end - middle)};
  }

 private:
  ProcessGroup& world_;
  ExpertRanks ranks_;
  ExpertTensors experts_;
  at::Tensor x_TD_, ids_TK_, weights_TK_;
};

void run(ProcessGroup& world) {
  at::set_num_threads(1);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const Shape& shape : {Shape{256, 512, 8, 2}, Shape{512, 1024, 8, 2}}) {
      for (const int64_t tokens : {8, 64, 256, 512, 1024, 2048, 4096}) {
        Layer layer(world, shape, dtype, tokens);
        std::vector<double> forward[2], backward[2];
        for (int64_t round = 0; round < 2 * kRounds + 2; ++round) {  // in turns; the first two warm up
          const Milliseconds time = layer.measure(1 + round % 2);
          if (round < 2) continue;
          forward[round % 2].push_back(time.forward);
          backward[round % 2].push_back(time.backward);
        }
        if (world.rank() > 0) continue;
        const double one[2] = {median(forward[0]), median(backward[0])};
        std::printf(
            "%s D %ld F %ld E %ld K %ld, %4ld tokens (%4ld rows an expert): forward %8.3f ms, backward %8.3f; "
            "two parts x%.3f, x%.3f\n",
            dtype == at::kFloat ? "fp32" : "bf16", shape.D, shape.F, shape.num_experts, shape.top_k, tokens,
            tokens * world.size() * shape.top_k / shape.num_experts, one[0], one[1], median(forward[1]) / one[0],
            median(backward[1]) / one[1]);
        std::fflush(stdout);
      }
    }
  }
}

}  // namespace
}  // namespace coterie

int main(int argc, char** argv) {
  const std::string argument = argc > 1 ? argv[1] : "2";
  if (argument.find('.') == std::string::npos) {
    coterie::run_ranks(std::atoi(argument.c_str()), 60.0, coterie::run);
    return 0;
  }
  coterie::ProcessGroup world(coterie::open_mpi_transport(argument), 60.0);
  coterie::run(world);
  world.finish();
}
