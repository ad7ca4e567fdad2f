// Weights in few bits, as files and tools hold them: codes row by row, with scales and, where the type stores them,
// minimums per group of K. See panels.h for the types and what an element is. No calibration is needed: what is kept
// of a weight depends on the weights of its group alone.
#pragma once

#include <cstdint>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/matrix.h"
#include "kernels/panels.h"

namespace coterie {

// A quantized matrix [rows, cols] that lies somewhere. A row of codes is whole units (panels.h) one behind the other;
// with 4 bits, pairs of units share their bytes: byte j of pair p has code 8 p + j in its low half and 8 p + 4 + j in
// the other. Codes past cols are never seen.
struct QuantizedView {
  PanelType type = PanelType::kInt8;
  int64_t rows = 0, cols = 0;
  const uint32_t* codes = nullptr;        // [rows][row_words()]
  const BFloat16* scales = nullptr;       // [rows][groups()]; or where the type stores minimums
  const uint8_t* scale_codes = nullptr;   // the same, in units of the row's factor
  const int8_t* minimum_codes = nullptr;  // the same, in kMinimumUnit of them
  const float* row_factors = nullptr;     // [rows]

  int64_t row_words() const { return quantized_row_words(type, cols); }
  int64_t groups() const { return groups_of(type, cols); }
  QuantizedView row_range(int64_t first, int64_t count) const;
  float scale(int64_t row, int64_t group) const;
  float minimum(int64_t row, int64_t group) const;
  float element(int64_t row, int64_t col) const;

  static int64_t quantized_row_words(PanelType type, int64_t cols) {
    return units_of(type, cols) * quantized_format(type).bits / 8;
  }
};

// The same with its own memory.
class QuantizedMatrix {
 public:
  QuantizedMatrix(PanelType type, int64_t rows, int64_t cols);  // undefined contents
  // Rounds every group for itself: kInt8 and kInt8A16 to the nearest of 255 codes around zero; kInt4Group64 and kInt4
  // to the nearest of 16 between a minimum and a maximum that are moved inwards as far as it makes the squared error
  // smaller, scale and minimum to codes of 8 bits. b: fp32 or bf16 with contiguous rows. Not for kMxfp4, which comes
  // from files.
  QuantizedMatrix(const ConstMatrix& b, PanelType type, ThreadPool& pool);

  QuantizedView view() const;
  uint32_t* codes() { return codes_.data(); }
  BFloat16* scales() { return scales_.data(); }

 private:
  PanelType type_;
  int64_t rows_, cols_;
  std::vector<uint32_t> codes_;
  std::vector<BFloat16> scales_;
  std::vector<uint8_t> scale_codes_;
  std::vector<int8_t> minimum_codes_;
  std::vector<float> row_factors_;
};

}  // namespace coterie
