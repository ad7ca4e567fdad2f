// The order in which the elements of a logical tensor are counted, such that what a rank holds is one range of them:
// row-major, or slice by slice. For the latter the row-major elements are seen as a matrix of `row` columns, which is
// cut into slices of `run` columns; a slice is counted whole, row by row, before the next one begins:
//
//   element p is row-major element q / run * row + p / size * run + q % run,  size = elements / row * run,  q = p %
//   size
//
// Slices of the columns of [E, D, F] have row = F; those of the rows of [E, F, D] have row = F * D.
#pragma once

#include <algorithm>
#include <cstdint>

namespace coterie {

struct ElementOrder {
  int64_t row = 0;  // divides the tensor's elements; 0: row-major
  int64_t run = 0;  // divides `row`

  bool operator==(const ElementOrder&) const = default;
};

inline bool fits(const ElementOrder& order, int64_t num_elements) {
  if (order.row == 0) return order.run == 0;
  return order.row > 0 && order.run > 0 && num_elements % order.row == 0 && order.row % order.run == 0;
}

// Elements of `order` in the order of row-major ones: for_each_run() with it finds where row-major elements are.
inline ElementOrder inverse(const ElementOrder& order, int64_t num_elements) {
  if (order.row == 0 || num_elements == 0) return {};
  return {num_elements / order.row * order.run, order.run};
}

// Elements [first, first + count) of a tensor's `order` as ranges of row-major elements: visit(first, count), in turn.
template <typename Visit>
void for_each_run(const ElementOrder& order, int64_t num_elements, int64_t first, int64_t count, Visit&& visit) {
  if (count == 0) return;
  const int64_t row = order.row > 0 ? order.row : num_elements, run = order.row > 0 ? order.run : num_elements;
  const int64_t size = num_elements / row * run;  // of a slice
  for (const int64_t end = first + count; first < end;) {
    const int64_t slice = first / size, in_slice = first % size, column = in_slice % run;
    const int64_t n = std::min(end - first, run - column);
    visit(in_slice / run * row + slice * run + column, n);
    first += n;
  }
}

}  // namespace coterie
