#include "comm/measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "base/memory.h"
#include "coterie/error.h"

namespace coterie {
namespace {

// Blocks of equal size, one per rank; nothing to itself.
struct EvenExchange {
  EvenExchange(const ProcessGroup& group, int64_t bytes_to_all) {
    const int64_t block = bytes_to_all / std::max(1, group.size() - 1);
    input = AlignedBuffer(static_cast<size_t>(block * group.size() + 1));
    output = AlignedBuffer(static_cast<size_t>(block * group.size() + 1));
    std::fill_n(input.as<char>(), input.size(), '\0');
    std::fill_n(output.as<char>(), output.size(), '\0');
    counts.assign(static_cast<size_t>(group.size()), block);
    counts[static_cast<size_t>(group.rank())] = 0;
    for (int r = 0; r < group.size(); ++r) offsets.push_back(r * block);
  }

  AllToAllV arguments() { return {input.data(), counts, offsets, output.data(), counts, offsets}; }

  AlignedBuffer input, output;
  std::vector<int64_t> counts, offsets;
};

}  // namespace

double median_seconds(int rounds, const std::function<void()>& run) {
  std::vector<double> seconds;
  for (int i = 0; i < rounds; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

double measure_operation(ProcessGroup& group, const std::string& operation, int64_t bytes, int rounds) {
  if (bytes < 0 || rounds < 1) throw InvalidArgument("measure: bytes or rounds out of range");
  double own = 0;
  group.barrier("measure " + operation);
  if (operation == "all_to_all") {
    EvenExchange exchange(group, bytes);
    own = median_seconds(rounds, [&] { group.all_to_all_v(exchange.arguments(), "measure"); });
  } else if (operation == "all_reduce") {
    std::vector<float> data(static_cast<size_t>(bytes / 4));
    const auto count = static_cast<int64_t>(data.size());
    own = median_seconds(rounds, [&] { group.all_reduce(data.data(), count, DType::kF32, ReduceOp::kSum, "measure"); });
  } else if (operation == "barrier") {
    own = median_seconds(rounds, [&] { group.barrier("measure"); });
  } else {
    throw InvalidArgument("measure: '" + operation + "' is not all_to_all, all_reduce or barrier");
  }
  auto picoseconds = static_cast<int64_t>(std::llround(own * 1e12));
  group.all_reduce(&picoseconds, 1, DType::kI64, ReduceOp::kMax, "measure");
  return static_cast<double>(picoseconds) * 1e-12;
}

}  // namespace coterie
