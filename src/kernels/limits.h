// What this machine can do at most, for benches: a figure means something only as a share of a limit that was
// measured in the same run, on the same threads.
#pragma once

#include <cstddef>

#include "base/dtype.h"
#include "base/memory.h"
#include "base/thread_pool.h"

namespace coterie {

// FLOP/s of products of `type` on registers alone, with the active kernels on all threads of the pool:
// the best of a few tries of some milliseconds.
double register_flops(DType type, ThreadPool& pool);

// Memory that is read once after another, in huge pages where the system has them. Make it larger than the
// caches; ResourceExhausted when there is no memory.
class ReadBandwidth {
 public:
  explicit ReadBandwidth(size_t bytes);

  // Bytes/s of one pass over the memory, every thread a part of its own.
  double measure(ThreadPool& pool);

 private:
  AlignedBuffer memory_;
};

}  // namespace coterie
