#include "train/pooled_tensor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

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
    used_ += size;
    most_used_ = std::max(most_used_, used_);
    const auto found = free_.find(size);
    if (found == free_.end()) return AlignedBuffer(size);
    waiting_ -= size;
    return std::move(free_.extract(found).mapped());
  }

  void give_back(AlignedBuffer buffer) {
    const std::lock_guard lock(mutex_);
    used_ -= buffer.size();
    if (waiting_ + buffer.size() > most_used_) return;
    waiting_ += buffer.size();
    free_.emplace(buffer.size(), std::move(buffer));
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
  std::mutex mutex_;
  std::multimap<size_t, AlignedBuffer> free_;
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
