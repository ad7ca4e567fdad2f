// One query against a run of keys, merged into its running softmax (the online form of Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).

constexpr int64_t kGroupRows = AttendStep::kGroupRows;

// Rows of a group, in each type that they come in: `at` is elements i, i + 1, ... of row r.

struct FloatRows {
  const float* rows;
  int64_t stride;
  COTERIE_INLINE VF at(int64_t r, int64_t i) const { return load(rows + r * stride + i); }
};
struct HalfRows {
  const uint16_t* rows;
  int64_t stride;
  COTERIE_INLINE VF at(int64_t r, int64_t i) const {
    return reinterpret_cast<VF>(load_halves(rows + r * stride + i) << 16);
  }
};
struct ByteRows {
  const int8_t* rows;
  int64_t stride;
  COTERIE_INLINE VF at(int64_t r, int64_t i) const { return load_bytes(rows + r * stride + i); }
};

// scores[j] = scale * q . keys[j] (times the key's factor), -infinity from n on to the end of the last vector. Returns
// the maximum.
template <typename Rows>
float score_keys(const AttendStep& step) {
  VF maximum = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < step.n; j += kWidth) {
    const Rows keys = {static_cast<decltype(Rows::rows)>(step.keys[j / kGroupRows]), step.d};
    const int64_t first = j % kGroupRows;
    VF sums[kWidth] = {};
    for (int64_t i = 0; i < step.d; i += kWidth) {
      const VF q = load(step.q + i);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) sums[r] = fma(q, keys.at(first + r, i), sums[r]);
    }
    VF scores = sum_each(sums) * step.scale;
    if (step.key_factors) scores *= load(step.key_factors[j / kGroupRows] + first);
    for (int64_t lane = step.n - j; lane < kWidth; ++lane) scores[lane] = -std::numeric_limits<float>::infinity();
    store(step.scores + j, scores);
    maximum = max(maximum, scores);
  }
  return max_lanes(maximum);
}

// out = out * correction + sum of scores[j] * values[j], kVectors vectors of dimensions at a time.
template <typename Rows, int kVectors>
void add_values(const AttendStep& step, float correction, int64_t first) {
  VF sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = load(step.out + first + v * kWidth) * correction;
  for (int64_t j = 0; j < step.n; j += kGroupRows) {
    const Rows values = {static_cast<decltype(Rows::rows)>(step.values[j / kGroupRows]), step.value_stride};
    const int64_t rows = step.n - j < kGroupRows ? step.n - j : kGroupRows;
    for (int64_t r = 0; r < rows; ++r) {
      const VF weight = broadcast(step.scores[j + r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[v] = fma(weight, values.at(r, first + v * kWidth), sums[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(step.out + first + v * kWidth, sums[v]);
}

template <typename Rows>
void attend_rows(const AttendStep& step) {
  const float previous = *step.maximum;
  const float block_maximum = score_keys<Rows>(step);
  const float maximum = block_maximum > previous ? block_maximum : previous;
  const float correction = exp(broadcast(previous - maximum))[0];  // 0 at the first block
  VF sums = {};
  for (int64_t j = 0; j < step.n; j += kWidth) {
    VF e = exp(load(step.scores + j) - maximum);
    sums += e;
    if (step.value_factors) e *= load(step.value_factors[j / kGroupRows] + j % kGroupRows);
    store(step.scores + j, e);
  }
  *step.maximum = maximum;
  *step.sum = *step.sum * correction + sum_lanes(sums);
  int64_t first = 0;
  for (; first + 8 * kWidth <= step.v; first += 8 * kWidth) add_values<Rows, 8>(step, correction, first);
  for (; first + 4 * kWidth <= step.v; first += 4 * kWidth) add_values<Rows, 4>(step, correction, first);
  for (; first < step.v; first += kWidth) add_values<Rows, 1>(step, correction, first);
}

void attend(const AttendStep& step) {
  if (step.dtype == DType::kBF16) return attend_rows<HalfRows>(step);
  if (step.dtype == DType::kI8) return attend_rows<ByteRows>(step);
  attend_rows<FloatRows>(step);
}
