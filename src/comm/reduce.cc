#include "comm/reduce.h"

#include <algorithm>
#include <string>

#include "base/check.h"

namespace coterie {
namespace {

// Elements at a time: the partial sums stay in the first cache.
constexpr int64_t kChunk = 2048;

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return to_float(value); }
inline uint64_t widen(int64_t value) { return static_cast<uint64_t>(value); }

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, BFloat16& out) { out = to_bfloat16(value); }
inline void narrow(uint64_t value, int64_t& out) { out = static_cast<int64_t>(value); }

inline float larger(float a, float b) { return b > a || b != b ? b : a; }
inline uint64_t larger(uint64_t a, uint64_t b) { return static_cast<int64_t>(b) > static_cast<int64_t>(a) ? b : a; }

template <typename T>
void reduce_typed(std::span<const void* const> inputs, T* out, int64_t count, ReduceOp op) {
  using Wide = decltype(widen(T{}));
  Wide partial[kChunk];
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t n = std::min(kChunk, count - begin);
    const T* first = static_cast<const T*>(inputs[0]) + begin;
    for (int64_t i = 0; i < n; ++i) partial[i] = widen(first[i]);
    for (size_t k = 1; k < inputs.size(); ++k) {
      const T* next = static_cast<const T*>(inputs[k]) + begin;
      if (op == ReduceOp::kSum) {
        for (int64_t i = 0; i < n; ++i) partial[i] += widen(next[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) partial[i] = larger(partial[i], widen(next[i]));
      }
    }
    for (int64_t i = 0; i < n; ++i) narrow(partial[i], out[begin + i]);
  }
}

}  // namespace

void reduce(std::span<const void* const> inputs, void* out, int64_t count, DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::kF32:
      return reduce_typed(inputs, static_cast<float*>(out), count, op);
    case DType::kBF16:
      return reduce_typed(inputs, static_cast<BFloat16*>(out), count, op);
    case DType::kI64:
      return reduce_typed(inputs, static_cast<int64_t*>(out), count, op);
    default:
      COTERIE_CHECK(false, "no reduction of " + std::string(dtype_name(dtype)));
  }
}

}  // namespace coterie
