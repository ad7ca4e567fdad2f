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
constexpr int64_t kRowFloats = 4096;  // 16 KiB, so that a row's sums stay in the first cache

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
  const KernelTable& kernels = active_kernels();
  const int threads = pool.num_threads();
  const auto rows = static_cast<int64_t>(memory_.size() / sizeof(float)) / kRowFloats;
  AlignedBuffer sums(static_cast<size_t>(threads * kRowFloats) * sizeof(float));
  std::memset(sums.data(), 0, sums.size());
  const double seconds = seconds_of(pool, [&](int64_t part, int) {
    for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; ++row) {
      kernels.add_row(memory_.as<float>() + row * kRowFloats, DType::kF32, sums.as<float>() + part * kRowFloats,
                      kRowFloats);
    }
  });
  return static_cast<double>(rows * kRowFloats) * sizeof(float) / seconds;
}

}  // namespace coterie
