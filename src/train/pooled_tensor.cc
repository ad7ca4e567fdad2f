#include "train/pooled_tensor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <list>
#include <mutex>

#include "base/memory.h"

namespace coterie {
namespace {

constexpr size_t kSmallest = size_t{1} << 20;
constexpr size_t kUnit = size_t{2} << 20;  // of a size: a huge page

class Pool {
 public:
  AlignedBuffer take(size_t bytes) {
    const size_t size = (bytes + kUnit - 1) / kUnit * kUnit;
    const std::lock_guard lock(mutex_);
    const auto found = best_fit(size);
    AlignedBuffer buffer;
    if (found != free_.rend()) {
      waiting_ -= found->size();
      buffer = std::move(*found);
      free_.erase(std::next(found).base());
    } else {
      buffer = AlignedBuffer(size);
    }
    used_ += buffer.size();
    most_used_ = std::max(most_used_, used_);
    return buffer;
  }

  // Those that nobody has asked for the longest make room. Not all sizes of a step are in use at once: what waits may
  // be more than what was in use, or some would be given up and asked for again in every step.
  void give_back(AlignedBuffer buffer) {
    const std::lock_guard lock(mutex_);
    used_ -= buffer.size();
    waiting_ += buffer.size();
    free_.push_back(std::move(buffer));
    for (; waiting_ > most_used_ + most_used_ / 2; free_.pop_front()) waiting_ -= free_.front().size();
  }

  size_t waiting() {
    const std::lock_guard lock(mutex_);
    return waiting_;
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    free_.clear();
    waiting_ = 0;
    most_used_ = used_;
  }

 private:
  using Buffers = std::list<AlignedBuffer>;

  // The smallest buffer of at least `size` bytes and at most a fourth more, of those the last one given back.
  Buffers::reverse_iterator best_fit(size_t size) {
    auto best = free_.rend();
    for (auto one = free_.rbegin(); one != free_.rend(); ++one) {
      const bool fits = one->size() >= size && one->size() <= size + size / 4;
      if (fits && (best == free_.rend() || one->size() < best->size())) best = one;
    }
    return best;
  }

  std::mutex mutex_;
  Buffers free_;                                   // in the order of their return
  size_t used_ = 0, most_used_ = 0, waiting_ = 0;  // bytes
};

// Never destroyed: tensors may outlive everything else.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const at::TensorOptions options = at::TensorOptions(dtype).device(at::kCPU);
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  if (bytes < kSmallest) return at::empty(sizes, options);
  auto* const buffer = new AlignedBuffer(pool().take(bytes));
  const auto give_back = [buffer](void*) {
    pool().give_back(std::move(*buffer));
    delete buffer;
  };
  return at::from_blob(buffer->data(), sizes, give_back, options);
}

size_t pooled_bytes() { return pool().waiting(); }

void release_pooled_memory() { pool().clear(); }

}  // namespace coterie
