// A model starts on the mapped file of its packed weights and moves into huge pages while it works: reading from there
// is faster, but to fill them takes longer than anybody wants to wait for the first token.
#pragma once

#include <atomic>
#include <exception>
#include <thread>

#include "base/memory.h"
#include "model/weights.h"

namespace coterie {

class WeightMover {
 public:
  // weights: from a FileStore; they must outlive the mover. Begins to copy, on a thread of its own.
  explicit WeightMover(ModelWeights& weights);
  ~WeightMover();
  WeightMover(const WeightMover&) = delete;
  WeightMover& operator=(const WeightMover&) = delete;

  // Between two forward passes: points the weights at the copy when it is complete. True when that is done, or when
  // they stay because memory does not suffice. CorruptFile when the file could not be read.
  bool move_if_ready();

 private:
  void copy();

  ModelWeights& weights_;
  BlockFile& file_;
  AlignedBuffer copy_;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false}, ready_{false};
  std::thread thread_;
};

}  // namespace coterie
