// Row-wise work cut into tasks that are worth handing out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/thread_pool.h"

namespace coterie {

// Elements of a task: about 10 us of element-wise work.
inline constexpr int64_t kElementsPerTask = 16 << 10;

// Calls body(row) for every row; `width` is the number of elements that one row costs. A single task's
// worth of rows runs on the calling thread, without waking anybody.
template <typename Body>
void parallel_rows(int64_t rows, int64_t width, ThreadPool& pool, const Body& body) {
  const int64_t step = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(width, 1));
  pool.run((rows + step - 1) / step, [&](int64_t task, int) {
    const int64_t last = std::min(rows, (task + 1) * step);
    for (int64_t row = task * step; row < last; ++row) body(row);
  });
}

}  // namespace coterie
