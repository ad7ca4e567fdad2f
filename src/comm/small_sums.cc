#include "comm/small_sums.h"

#include <algorithm>

namespace coterie {

void sum_over_ranks(ProcessGroup* group, std::span<double> numbers, std::string_view label) {
  if (!group || numbers.empty()) return;
  std::vector<double> of_ranks(numbers.size() * static_cast<size_t>(group->size()));
  group->all_gather(numbers.data(), of_ranks.data(), static_cast<int64_t>(numbers.size_bytes()), label);
  std::copy_n(of_ranks.begin(), numbers.size(), numbers.begin());
  for (size_t i = numbers.size(); i < of_ranks.size(); ++i) numbers[i % numbers.size()] += of_ranks[i];
}

void sum_over_ranks(ProcessGroup* group, const std::vector<std::span<int64_t>>& counts, std::string_view label) {
  if (!group || counts.empty()) return;
  std::vector<int64_t> all;
  for (const std::span<int64_t>& part : counts) all.insert(all.end(), part.begin(), part.end());
  group->all_reduce(all.data(), static_cast<int64_t>(all.size()), DType::kI64, ReduceOp::kSum, label);
  auto next = all.cbegin();
  for (const std::span<int64_t>& part : counts) {
    std::copy_n(next, part.size(), part.begin());
    next += static_cast<std::ptrdiff_t>(part.size());
  }
}

}  // namespace coterie
