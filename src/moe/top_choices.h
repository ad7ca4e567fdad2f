// The K best of a row of values, for K of at most a few dozen.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace coterie {

// Keeps the K highest of the values offered, highest first; of equal ones those that came first stand
// first. Values are numbers (no NaN).
class TopChoices {
 public:
  explicit TopChoices(int64_t K) : K_(K), values_(static_cast<size_t>(K)) {}

  void start(int32_t* ids_K) {
    ids_ = ids_K;
    count_ = 0;
  }

  // Offers values[i] under the id i, for i in [first, last).
  void offer(const float* values, int64_t first, int64_t last) {
    int64_t i = first;
    for (; i < last && count_ < K_; ++i) insert(values[i], i, count_++);
    // Few values pass once the list is full, so whole blocks are skipped at a glance.
    for (; i + kBlock <= last; i += kBlock) {
      if (any_above(values + i, values_[K_ - 1])) offer_each(values, i, i + kBlock);
    }
    offer_each(values, i, last);
  }

 private:
  static constexpr int64_t kBlock = 16;

  static bool any_above(const float* values, float threshold) {
    int any = 0;
    for (int64_t i = 0; i < kBlock; ++i) any |= values[i] > threshold;
    return any != 0;
  }

  void offer_each(const float* values, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (values[i] > values_[K_ - 1]) insert(values[i], i, K_ - 1);
    }
  }

  // Puts a value into the sorted list, whose entry `place` is free.
  void insert(float value, int64_t id, int64_t place) {
    for (; place > 0 && value > values_[place - 1]; --place) {
      values_[place] = values_[place - 1];
      ids_[place] = ids_[place - 1];
    }
    values_[place] = value;
    ids_[place] = static_cast<int32_t>(id);
  }

  int64_t K_;
  int64_t count_ = 0;
  std::vector<float> values_;
  int32_t* ids_ = nullptr;
};

// A NaN is worth less than any number.
inline float ordered(float value) { return value == value ? value : -std::numeric_limits<float>::infinity(); }

}  // namespace coterie
