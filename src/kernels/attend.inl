// One query against a run of keys, merged into its running softmax (the online form of Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).

// scores[j] = scale * q . keys[j], -infinity from n on to the end of the last vector. Returns the maximum.
float score_keys(const AttendStep& step) {
  VF maximum = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < step.n; j += kWidth) {
    VF sums[kWidth] = {};
    for (int64_t i = 0; i < step.d; i += kWidth) {
      const VF q = load(step.q + i);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) sums[r] = fma(q, load(step.keys + (j + r) * step.d + i), sums[r]);
    }
    VF scores = sum_each(sums) * step.scale;
    for (int64_t lane = step.n - j; lane < kWidth; ++lane) scores[lane] = -std::numeric_limits<float>::infinity();
    store(step.scores + j, scores);
    maximum = max(maximum, scores);
  }
  return max_lanes(maximum);
}

// out = out * correction + sum of scores[j] * values[j], kVectors vectors of dimensions at a time.
template <int kVectors>
void add_values(const AttendStep& step, float correction, int64_t first) {
  VF sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = load(step.out + first + v * kWidth) * correction;
  const float* values = step.values + first;
  for (int64_t j = 0; j < step.n; ++j, values += step.value_stride) {
    const VF weight = broadcast(step.scores[j]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[v] = fma(weight, load(values + v * kWidth), sums[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(step.out + first + v * kWidth, sums[v]);
}

void attend(const AttendStep& step) {
  const float previous = *step.maximum;
  const float block_maximum = score_keys(step);
  const float maximum = block_maximum > previous ? block_maximum : previous;
  const float correction = exp(broadcast(previous - maximum))[0];  // 0 at the first block
  VF sums = {};
  for (int64_t j = 0; j < step.n; j += kWidth) {
    const VF e = exp(load(step.scores + j) - maximum);
    store(step.scores + j, e);
    sums += e;
  }
  *step.maximum = maximum;
  *step.sum = *step.sum * correction + sum_lanes(sums);
  int64_t first = 0;
  for (; first + 8 * kWidth <= step.v; first += 8 * kWidth) add_values<8>(step, correction, first);
  for (; first + 4 * kWidth <= step.v; first += 4 * kWidth) add_values<4>(step, correction, first);
  for (; first < step.v; first += kWidth) add_values<1>(step, correction, first);
}
