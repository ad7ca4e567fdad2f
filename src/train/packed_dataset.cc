#include "train/packed_dataset.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "base/philox.h"
#include "coterie/error.h"

namespace coterie {
namespace {

// A permutation of [0, n) by a balanced Feistel network over the next even power of two, walking the
// cycle until the value falls below n (at most 4 walks on average, since 4^bits < 4n).
int64_t permute(int64_t value, int64_t n, uint64_t seed, uint64_t epoch) {
  int half_bits = 1;
  while ((int64_t{1} << (2 * half_bits)) < n) ++half_bits;
  const uint64_t mask = (uint64_t{1} << half_bits) - 1;
  auto x = static_cast<uint64_t>(value);
  do {
    for (uint64_t round = 0; round < 4; ++round) {
      const uint64_t left = x >> half_bits, right = x & mask;
      const uint64_t mixed = left ^ (philox(seed, epoch << 2 | round, right)[0] & mask);
      x = right << half_bits | mixed;
    }
  } while (x >= static_cast<uint64_t>(n));
  return static_cast<int64_t>(x);
}

}  // namespace

PackedDataset::PackedDataset(const std::string& directory, const std::string& split, int64_t sequence_length,
                             uint64_t seed)
    : tokens_(directory, split), sequence_length_(sequence_length), seed_(seed) {
  num_windows_ = (tokens_.num_tokens() - 1) / sequence_length;
  if (tokens_.num_tokens() < 1 || num_windows_ < 1) {
    throw InvalidArgument(directory + ": the " + split + " split has " + std::to_string(tokens_.num_tokens()) +
                          " tokens, fewer than one window of data.sequence_length + 1 (" +
                          std::to_string(sequence_length + 1) + ")");
  }
}

int64_t PackedDataset::window_at(int64_t place) const {
  return permute(place % num_windows_, num_windows_, seed_, static_cast<uint64_t>(place / num_windows_));
}

void PackedDataset::copy_window(int64_t window, int64_t* out) const {
  std::vector<int32_t> ids(static_cast<size_t>(sequence_length_ + 1));
  tokens_.copy(window * sequence_length_, sequence_length_ + 1, ids.data());
  std::copy(ids.begin(), ids.end(), out);
}

at::Tensor PackedDataset::training_batch(int64_t first, int64_t count) const {
  at::Tensor batch = at::empty({count, sequence_length_ + 1}, at::kLong);
  for (int64_t i = 0; i < count; ++i)
    copy_window(window_at(first + i), batch.mutable_data_ptr<int64_t>() + i * batch.size(1));
  return batch;
}

at::Tensor PackedDataset::windows(int64_t first, int64_t count) const {
  at::Tensor batch = at::empty({count, sequence_length_ + 1}, at::kLong);
  for (int64_t i = 0; i < count; ++i) copy_window(first + i, batch.mutable_data_ptr<int64_t>() + i * batch.size(1));
  return batch;
}

}  // namespace coterie
