// Views of dense matrices in memory. Element (r, c) is data[r * row_stride + c * col_stride], so a
// transposed matrix is the same bytes with the strides exchanged. Views own nothing.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace coterie {

struct ConstMatrix {
  const void* data = nullptr;
  DType dtype = DType::kF32;  // kF32 or kBF16
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  // in elements
  int64_t col_stride = 1;

  ConstMatrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
  // The block of `count` rows from `first` on.
  ConstMatrix row_range(int64_t first, int64_t count) const {
    const auto* base = static_cast<const char*>(data) + first * row_stride * static_cast<int64_t>(dtype_size(dtype));
    return {base, dtype, count, cols, row_stride, col_stride};
  }
};

struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kF32;  // kF32 or kBF16
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  // in elements; columns are contiguous

  operator ConstMatrix() const { return {data, dtype, rows, cols, row_stride, 1}; }
  Matrix row_range(int64_t first, int64_t count) const {
    auto* base = static_cast<char*>(data) + first * row_stride * static_cast<int64_t>(dtype_size(dtype));
    return {base, dtype, count, cols, row_stride};
  }
};

// Row-major views with contiguous rows.
inline ConstMatrix row_major(const void* data, DType dtype, int64_t rows, int64_t cols) {
  return {data, dtype, rows, cols, cols, 1};
}
inline ConstMatrix row_major(const float* data, int64_t rows, int64_t cols) {
  return row_major(data, DType::kF32, rows, cols);
}
inline Matrix row_major(void* data, DType dtype, int64_t rows, int64_t cols) { return {data, dtype, rows, cols, cols}; }
inline Matrix row_major(float* data, int64_t rows, int64_t cols) { return row_major(data, DType::kF32, rows, cols); }

}  // namespace coterie
