// How close the kernels come to what the machine can do.
//
//   kernels_bench [--benchmark_filter=...]     COTERIE_THREADS=2 COTERIE_ISA=avx2 kernels_bench
//
// Every line gives GFLOP/s of useful work and, as `peak`, their share of the FMA rate on registers alone,
// measured on the same threads right before and after the line: on a shared machine only that share can be
// compared between lines or runs. For one row of A (decode) the limit is memory; `GB/s` counts the bytes of
// weights, or of keys and values, which are larger than the caches.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "base/machine.h"
#include "base/round.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/kernel_table.h"
#include "kernels/limits.h"
#include "kernels/quantized.h"
#include "moe/experts.h"
#include "moe/router.h"

namespace coterie {
namespace {

NativeThreadPool& pool() {
  static NativeThreadPool instance([] {
    const char* threads = std::getenv("COTERIE_THREADS");
    return threads ? std::atoi(threads) : available_cpus();
  }());
  return instance;
}

// Runs the work for as long as the library wants, and reports its rate.
template <typename Work>
void measure(benchmark::State& state, DType type, double flops, double bytes, const Work& work) {
  work();  // touches the workspaces
  double peak = register_flops(type, pool());
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) work();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  peak = std::max(peak, register_flops(type, pool()));
  const double rate = flops * static_cast<double>(state.iterations()) / seconds.count();
  state.counters["GFLOP/s"] = rate / 1e9;
  state.counters["peak"] = rate / peak;
  if (bytes > 0) state.counters["GB/s"] = bytes * static_cast<double>(state.iterations()) / seconds.count() / 1e9;
}

// Random memory of a type.
struct Tensor {
  AlignedBuffer memory;
  DType dtype;

  Tensor(DType type, int64_t n) : memory(static_cast<size_t>(n) * dtype_size(type)), dtype(type) {
    std::minstd_rand random(1);
    for (int64_t i = 0; i < n; ++i) {
      const float value = static_cast<float>(random()) / static_cast<float>(std::minstd_rand::max()) - 0.5f;
      if (type == DType::kBF16) {
        memory.as<BFloat16>()[i] = to_bfloat16(value);
      } else {
        memory.as<float>()[i] = value;
      }
    }
  }
  void* data() { return memory.data(); }
};

DType type_of(const benchmark::State& state) { return state.range(0) ? DType::kBF16 : DType::kF32; }

// [bf16, M, N, K, packed]. Enough copies of B to leave the caches when M is small.
void BM_Gemm(benchmark::State& state) {
  const DType type = type_of(state);
  const int64_t M = state.range(1), N = state.range(2), K = state.range(3);
  const auto b_bytes = N * K * static_cast<int64_t>(dtype_size(type));
  const int64_t copies = M < 64 ? std::max<int64_t>(1, (int64_t{1} << 30) / b_bytes) : 1;
  Tensor a(type, M * K), b(type, N * K), c(type, M * N);
  std::vector<PackedMatrix> packed;
  for (int64_t i = 0; i < copies && state.range(4); ++i) packed.emplace_back(row_major(b.data(), type, N, K), pool());
  int64_t next = 0;
  measure(state, type, 2.0 * static_cast<double>(M * N * K), static_cast<double>(b_bytes), [&] {
    GemmProblem problem;
    problem.a = row_major(a.data(), type, M, K);
    if (packed.empty()) problem.b = row_major(b.data(), type, N, K);
    if (!packed.empty()) problem.packed_b = &packed[next++ % packed.size()];
    problem.c = row_major(c.data(), type, M, N);
    gemm(problem, pool());
  });
}

void gemm_shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"bf16", "M", "N", "K", "packed"});
  for (int64_t type : {0, 1}) {
    for (int64_t M : {1, 8, 64, 512, 2048}) {
      for (int64_t packed : {1, 0}) {
        if (M > 8 || packed) bench->Args({type, M, 1024, 1024, packed});
      }
    }
    bench->Args({type, 4096, 512, 256, 0});
    bench->Args({type, 2048, 2048, 2048, 0});
    for (int64_t packed : {1, 0}) {  // a long K, which is multiplied in slices
      bench->Args({type, 512, 2048, 8192, packed});
      bench->Args({type, 512, 2048, 14336, packed});
    }
    bench->Args({type, 64, 2048, 14336, 1});
  }
}
BENCHMARK(BM_Gemm)->Apply(gemm_shapes)->Unit(benchmark::kMicrosecond)->UseRealTime();

// [type (see PanelType), M, N, K], products of few bits. So many copies of B that they leave the caches.
void BM_GemmQuantized(benchmark::State& state) {
  const auto type = static_cast<PanelType>(state.range(0));
  const int64_t M = state.range(1), N = state.range(2), K = state.range(3);
  Tensor a(DType::kF32, M * K), b(DType::kF32, N * K), c(DType::kF32, M * N);
  const QuantizedMatrix quantized(row_major(b.data(), DType::kF32, N, K), type, pool());
  std::vector<PackedMatrix> packed;
  size_t bytes = 0;
  while (bytes < size_t{1} << 30) bytes += packed.emplace_back(quantized.view(), pool()).bytes();
  state.SetLabel(type == PanelType::kInt8 ? "int8" : type == PanelType::kInt8A16 ? "int8a16" : "int4");
  size_t next = 0;
  const auto b_bytes = static_cast<double>(packed.front().bytes());
  measure(state, DType::kF32, 2.0 * static_cast<double>(M * N * K), b_bytes, [&] {
    GemmProblem problem;
    problem.a = row_major(a.data(), DType::kF32, M, K);
    problem.packed_b = &packed[next++ % packed.size()];
    problem.c = row_major(c.data(), DType::kF32, M, N);
    gemm(problem, pool());
  });
}

void quantized_shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"type", "M", "N", "K"});
  for (PanelType type : {PanelType::kInt8, PanelType::kInt8A16, PanelType::kInt4}) {
    for (int64_t M : {1, 2, 4, 8, 64, 512}) bench->Args({index_of(type), M, 1024, 1024});
  }
}
BENCHMARK(BM_GemmQuantized)->Apply(quantized_shapes)->Unit(benchmark::kMicrosecond)->UseRealTime();

// A layer of experts with everything that a training step or a forward pass needs.
struct Layer {
  DType type;
  int64_t T, D, F, E, K;
  ExpertShape shape;
  Tensor x, up, down, grad_out, out, grad_x, grad_up, grad_down;
  ExpertWeights weights;
  Dispatch dispatch;
  ExpertsContext context;
  std::vector<float> grad_weight_R;

  explicit Layer(const benchmark::State& state)
      : type(type_of(state)),
        T(state.range(1)),
        D(state.range(2)),
        F(state.range(3)),
        E(state.range(4)),
        K(state.range(5)),
        shape{E, D, F, state.range(6) ? Activation::kSilu : Activation::kGelu, state.range(6) != 0},
        x(type, T * D),
        up(type, E * shape.up_rows() * D),
        down(type, E * D * F),
        grad_out(type, T * D),
        out(type, T * D),
        grad_x(type, T * D),
        grad_up(type, E * shape.up_rows() * D),
        grad_down(type, E * D * F),
        weights{up.data(), down.data(), nullptr, nullptr, type} {
    RouterConfig config;
    config.num_experts = E;
    config.top_k = K;
    Tensor logits(DType::kF32, T * E);
    dispatch = make_dispatch(route(config, logits.memory.as<float>(), T, {}, pool()));
    grad_weight_R.resize(dispatch.token_R.size());
  }
  double forward_flops() const { return 2.0 * static_cast<double>(dispatch.num_rows() * D * (shape.up_rows() + F)); }
  void forward() {
    experts_forward(shape, weights, dispatch, row_major(x.data(), type, T, D), row_major(out.data(), type, T, D),
                    &context, pool());
  }
  void backward() {
    ExpertGradients gradients;
    gradients.grad_x_TD = grad_x.data();
    gradients.grad_up_EUD = grad_up.data();
    gradients.grad_down_EDF = grad_down.data();
    gradients.grad_weight_R = grad_weight_R.data();
    experts_backward(shape, weights, dispatch, row_major(x.data(), type, T, D), row_major(grad_out.data(), type, T, D),
                     context, gradients, pool());
  }
};

void BM_ExpertsForward(benchmark::State& state) {
  Layer layer(state);
  measure(state, layer.type, layer.forward_flops(), 0, [&] { layer.forward(); });
}
void BM_ExpertsBackward(benchmark::State& state) {
  Layer layer(state);
  layer.forward();
  measure(state, layer.type, 2 * layer.forward_flops(), 0, [&] { layer.backward(); });
}
void BM_ExpertsStep(benchmark::State& state) {
  Layer layer(state);
  measure(state, layer.type, 3 * layer.forward_flops(), 0, [&] {
    layer.forward();
    layer.backward();
  });
}
void BM_ExpertsPacked(benchmark::State& state) {
  Layer layer(state);
  const PackedExperts packed(layer.shape, layer.weights, pool());
  measure(state, layer.type, layer.forward_flops(), 0, [&] {
    experts_forward(packed, layer.dispatch, row_major(layer.x.data(), layer.type, layer.T, layer.D),
                    row_major(layer.out.data(), layer.type, layer.T, layer.D), pool());
  });
}

void training_shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"bf16", "T", "D", "F", "E", "K", "gated"});
  for (int64_t type : {0, 1}) {
    for (int64_t K : {1, 2}) bench->Args({type, 4096, 256, 512, 8, K, 1});
    bench->Args({type, 4096, 256, 1024, 8, 1, 0});
    bench->Args({type, 1024, 128, 256, 1, 1, 1});  // a small model's MLP
    for (int64_t E : {8, 64}) bench->Args({type, 2048, 512, 2048, E, 1, 0});
  }
}
// The shapes of the table of peers: 2048 tokens, hidden 512, inner 2048, GELU.
void peer_shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"bf16", "T", "D", "F", "E", "K", "gated"});
  for (int64_t type : {1, 0}) {
    for (int64_t E : {8, 32, 64, 128}) {
      for (int64_t K : {1, 2}) bench->Args({type, 2048, 512, 2048, E, K, 0});
    }
  }
}
void serving_shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"bf16", "T", "D", "F", "E", "K", "gated"});
  for (int64_t T : {1, 8, 32, 512}) bench->Args({1, T, 1024, 512, 64, 8, 1});
}
BENCHMARK(BM_ExpertsForward)->Apply(training_shapes)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(BM_ExpertsBackward)->Apply(training_shapes)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(BM_ExpertsStep)->Apply(peer_shapes)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(BM_ExpertsPacked)->Apply(serving_shapes)->Unit(benchmark::kMillisecond)->UseRealTime();

// Routing forward and backward: [T, E, K, G groups, capacity factor in percent]
void BM_Route(benchmark::State& state) {
  const int64_t T = state.range(0), E = state.range(1);
  const RouterConfig config{.num_experts = E,
                            .top_k = state.range(2),
                            .num_groups = state.range(3),
                            .top_k_groups = (state.range(3) + 1) / 2,
                            .normalize = true,
                            .capacity_factor = static_cast<float>(state.range(4)) / 100.0f};
  Tensor logits(DType::kF32, T * E), grad(DType::kF32, T * config.top_k), grad_logits(DType::kF32, T * E);
  for (auto _ : state) {
    const Routing routing = route(config, logits.memory.as<float>(), T, {.training = true}, pool());
    route_backward(config, routing, grad.memory.as<float>(), nullptr, grad_logits.memory.as<float>(), pool());
  }
  state.SetItemsProcessed(state.iterations() * T);
}
BENCHMARK(BM_Route)
    ->ArgNames({"T", "E", "K", "G", "capacity"})
    ->Args({4096, 8, 1, 1, 0})
    ->Args({4096, 8, 2, 1, 100})
    ->Args({4096, 64, 8, 1, 0})
    ->Args({4096, 64, 8, 1, 100})
    ->Args({4096, 256, 8, 8, 0})
    ->Args({4096, 256, 16, 1, 0})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

// [sequences, T new of each, S total, H, G, d, cache (see DType)], in the engine's blocks.
void BM_Attention(benchmark::State& state) {
  const int64_t sequences = state.range(0), T = state.range(1), S = state.range(2);
  const AttentionShape shape = {
      .H = state.range(3), .G = state.range(4), .d = state.range(5), .v = state.range(5), .scale = 0.125f};
  const auto type = static_cast<DType>(state.range(6));
  constexpr int64_t kBlock = 64;
  const int64_t blocks = round_up(S, kBlock) / kBlock,
                block_bytes = KvBlock(type, kBlock, shape.G, shape.d, shape.v).bytes();
  Tensor q(DType::kF32, sequences * T * shape.H * shape.d), out(DType::kF32, sequences * T * shape.H * shape.d);
  Tensor values(DType::kF32, S * shape.G * shape.d);
  AlignedBuffer cache(static_cast<size_t>(sequences * blocks * block_bytes));
  std::vector<void*> kv_blocks;
  for (int64_t b = 0; b < sequences * blocks; ++b) kv_blocks.push_back(cache.as<char>() + b * block_bytes);
  std::vector<AttentionChunk> chunks;
  for (int64_t i = 0; i < sequences; ++i) {
    const PagedKv kv = {kv_blocks.data() + i * blocks, type, kBlock};
    const AttentionChunk all = {kv, 0, S, S};
    append_kv({&all, 1}, values.memory.as<float>(), values.memory.as<float>(), shape, pool());
    chunks.push_back({kv, i * T, T, S});
  }
  state.SetLabel(std::string(dtype_name(type)));
  const double pairs = static_cast<double>(T) * (static_cast<double>(S) - static_cast<double>(T - 1) / 2);
  const double flops = 4 * pairs * static_cast<double>(sequences * shape.H * shape.d);
  measure(state, DType::kF32, flops, T == 1 ? static_cast<double>(cache.size()) : 0,
          [&] { attention(chunks, q.memory.as<float>(), shape, out.memory.as<float>(), pool()); });
}
void attention_shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"sequences", "T", "S", "H", "G", "d", "cache"});
  for (DType type : {DType::kF32, DType::kBF16, DType::kI8}) {
    const auto cache = static_cast<int64_t>(type);
    bench->Args({1, 512, 512, 16, 16, 64, cache});
    bench->Args({1, 512, 512, 16, 4, 64, cache});
    bench->Args({1, 512, 512, 8, 8, 128, cache});
    for (int64_t G : {16, 4, 2}) bench->Args({1, 1, 2048, 16, G, 64, cache});
    for (int64_t d : {64, 128}) bench->Args({256, 1, 576, 1024 / d, 1024 / d, d, cache});  // from memory
  }
}
BENCHMARK(BM_Attention)->Apply(attention_shapes)->Unit(benchmark::kMicrosecond)->UseRealTime();

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace
}  // namespace coterie

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  using coterie::DType;
  std::printf("%s, isa %s, %d threads; registers only: fp32 %.0f GFLOP/s, bf16 %.0f GFLOP/s\n",
              coterie::cpu_name().c_str(), std::string(coterie::active_kernels().name).c_str(),
              coterie::pool().num_threads(), coterie::register_flops(DType::kF32, coterie::pool()) / 1e9,
              coterie::register_flops(DType::kBF16, coterie::pool()) / 1e9);
  benchmark::RunSpecifiedBenchmarks();
}
