#include "kernels/limits.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "kernels/kernel_table.h"

namespace coterie {
namespace {

constexpr int kTries = 4;
constexpr double kFlopsPerTry = 1e9;  // of one thread: 1 to 10 ms

template <typename Task>
double seconds_of(ThreadPool& pool, const Task& task) {
  const auto start = std::chrono::steady_clock::now();
  pool.run(pool.num_threads(), task);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double register_flops(DType type, ThreadPool& pool) {
  const KernelTable& kernels = active_kernels();
  const auto steps = static_cast<int64_t>(kFlopsPerTry / static_cast<double>(kernels.peak_flops(type)));
  std::vector<float> kept(static_cast<size_t>(pool.num_threads()));  // results that nothing may optimise away
  double best = 0;
  for (int i = 0; i < kTries; ++i) {
    const double seconds =
        seconds_of(pool, [&](int64_t task, int) { kept[task] = kernels.register_peak[type == DType::kBF16](steps); });
    best = std::max(best, static_cast<double>(steps * kernels.peak_flops(type)) * pool.num_threads() / seconds);
  }
  return best;
}

ReadBandwidth::ReadBandwidth(size_t bytes) : memory_(bytes) { std::memset(memory_.data(), 0, bytes); }

double ReadBandwidth::measure(ThreadPool& pool) {
  const KernelTable& best = *supported_kernels().front();  // memory is the same whatever computes
  const int threads = pool.num_threads();
  const auto floats = static_cast<int64_t>(memory_.size() / sizeof(float));
  std::vector<float> kept(static_cast<size_t>(threads));
  // Nothing but reading: to write beside it, if only to the first cache, would take up to half of the rate.
  const double seconds = seconds_of(pool, [&](int64_t part, int) {
    const int64_t first = floats * part / threads, last = floats * (part + 1) / threads;
    kept[part] = best.square_sum_row(memory_.as<float>() + first, DType::kF32, last - first);
  });
  return static_cast<double>(memory_.size()) / seconds;
}

}  // namespace coterie
