// Row-wise work cut into tasks that are worth handing out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/round.h"
#include "base/thread_pool.h"

namespace coterie {

// Elements of a task: about 10 us of element-wise work.
inline constexpr int64_t kElementsPerTask = 16 << 10;

// Cuts the rows into ranges and calls body(first, last) for each; `width` is the number of elements that
// one row costs. A single task's worth of rows runs on the calling thread, without waking anybody.
template <typename Body>
void parallel_row_ranges(int64_t rows, int64_t width, ThreadPool& pool, const Body& body) {
  const int64_t step = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(width, 1));
  pool.run(ceil_div(rows, step), [&](int64_t task, int) { body(task * step, std::min(rows, (task + 1) * step)); });
}

// The same, calling body(row) for every row.
template <typename Body>
void parallel_rows(int64_t rows, int64_t width, ThreadPool& pool, const Body& body) {
  parallel_row_ranges(rows, width, pool, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row);
  });
}

}  // namespace coterie
