// Memory for intermediate results that lives as long as the thread that calls an operation, so that
// its pages are touched once: fresh memory costs several times what reading it does.
#pragma once

#include "base/memory.h"

namespace coterie {

// Hands out parts of one buffer. reserve() first, with the sum of padded() of all parts; then take().
class Workspace {
 public:
  static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

  void reserve(size_t bytes) {
    // Growing by halves keeps a slowly growing batch from reallocating every time.
    if (bytes > buffer_.size()) buffer_.reserve(bytes + bytes / 2);
    used_ = 0;
  }
  template <typename T>
  T* take(size_t count) {
    T* part = reinterpret_cast<T*>(buffer_.as<char>() + used_);
    used_ += padded(count * sizeof(T));
    return part;
  }

 private:
  AlignedBuffer buffer_;
  size_t used_ = 0;
};

}  // namespace coterie
