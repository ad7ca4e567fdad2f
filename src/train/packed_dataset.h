// Training and validation batches out of a packed token file. A window is sequence_length + 1 tokens,
// windows start every sequence_length tokens. Which windows make batch n is a pure function of
// (seed, n): each epoch visits every window once, in an order that a keyed permutation computes
// without storing it, so a run resumes at any step by knowing its number alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "io/packed_tokens.h"

namespace coterie {

class PackedDataset {
 public:
  // InvalidArgument when the split holds no whole window.
  PackedDataset(const std::string& directory, const std::string& split, int64_t sequence_length, uint64_t seed);

  int64_t num_windows() const { return num_windows_; }
  const PackedTokens& tokens() const { return tokens_; }

  // int64 [count, sequence_length + 1]: the windows at places first, first + 1, ... of the endless
  // training order.
  at::Tensor training_batch(int64_t first, int64_t count) const;

  // The windows first, first + 1, ... in file order.
  at::Tensor windows(int64_t first, int64_t count) const;

  // The window at a place of the training order.
  int64_t window_at(int64_t place) const;

 private:
  void copy_window(int64_t window, int64_t* out) const;

  PackedTokens tokens_;
  int64_t sequence_length_;
  uint64_t seed_;
  int64_t num_windows_;
};

}  // namespace coterie
