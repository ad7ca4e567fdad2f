// Queries against a run of keys, merged into their running softmaxes (the online form of Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018). A few queries at a time share what is read of keys and values;
// what becomes of one does not depend on the others, nor on how the keys lie.

constexpr int64_t kGroupRows = AttendStep::kGroupRows, kRunKeys = AttendStep::kRunKeys;
constexpr int kTileQueries = kVectorBytes == 64 ? 4 : 2;
static_assert(kTileQueries <= AttendStep::kMostTileQueries);

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

// Lane r of the result is q . keys[r]: each lane of q has a sum of its own, and then halves of them are added.
template <typename Rows>
COTERIE_INLINE VF dot_rows(const float* q, const Rows& keys, int64_t first, int64_t d) {
  VF sums[kWidth] = {};
  for (int64_t i = 0; i < d; i += kWidth) {
    const VF part = load(q + i);
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) sums[r] = fma(part, keys.at(first + r, i), sums[r]);
  }
  return sum_each(sums);
}

// The same sums, in the same order, of keys that are columns of a panel: those of dimensions lane, lane + kStep, ...
template <int kQueries, int kStep = 1>
COTERIE_INLINE void dot_columns(const float* q, const float* keys, int64_t d, int lane, VF (&sums)[kQueries]) {
  if constexpr (kStep == kWidth) {
    for (int64_t i = lane; i < d; i += kWidth) {
      const VF part = load(keys + i * 2 * kWidth);
#pragma GCC unroll 4
      for (int t = 0; t < kQueries; ++t) sums[t] = fma(broadcast(q[t * d + i]), part, sums[t]);
    }
  } else {
    VF others[kQueries] = {};
    dot_columns<kQueries, 2 * kStep>(q, keys, d, lane, sums);
    dot_columns<kQueries, 2 * kStep>(q, keys, d, lane + kStep, others);
#pragma GCC unroll 4
    for (int t = 0; t < kQueries; ++t) sums[t] += others[t];
  }
}

// Queries [first, first + kQueries) of a step, each of which sees a key.
template <typename Rows, int kQueries>
struct QueryTile {
  const AttendStep& step;
  int64_t first;
  AttendStep::Keys seen[kQueries];
  int64_t first_key, last_key;  // that any of them sees; the first of a whole vector

  COTERIE_INLINE QueryTile(const AttendStep& attend_step, int64_t first_query) : step(attend_step), first(first_query) {
    for (int t = 0; t < kQueries; ++t) seen[t] = step.seen(first + t);
    first_key = seen[0].first / kWidth * kWidth;
    last_key = seen[kQueries - 1].last;
  }

  void attend() const {
    float corrections[kQueries];
    score();
    for (int t = 0; t < kQueries; ++t) corrections[t] = weigh(t);
    add_values(corrections);
  }

 private:
  float* scores(int t) const { return step.scores + t * kRunKeys; }

  // Asks for kWidth rows of what comes next, from row j on. The first queries do.
  COTERIE_INLINE void ask_for(const void* const* groups, int64_t j, int64_t row_elements) const {
    if (!groups || !groups[j / kGroupRows] || first > 0) return;
    const auto row_bytes = row_elements * static_cast<int64_t>(sizeof(*Rows::rows));
    const char* const rows = static_cast<const char*>(groups[j / kGroupRows]) + j % kGroupRows * row_bytes;
    for (int64_t i = 0; i < kWidth * row_bytes; i += 64) __builtin_prefetch(rows + i);
  }

  // scores[j] = scale * q . keys[j] (times the key's factor), -infinity where the query does not see the key.
  void score() const {
    const VI lanes = shuffle_mask<Lanes>(std::make_integer_sequence<int, kWidth>());
    for (int64_t j = first_key; j < last_key; j += kWidth) {
      VF dots[kQueries];
      multiply(j, dots);
      ask_for(step.next_keys, j, step.d);
#pragma GCC unroll 4
      for (int t = 0; t < kQueries; ++t) {
        VF score = dots[t] * step.scale;
        if (step.key_factors) score *= load(step.key_factors[j / kGroupRows] + j % kGroupRows);
        const VI key = lanes + static_cast<int32_t>(j);
        const AttendStep::Keys keys = seen[t];
        const VI hidden = (key < static_cast<int32_t>(keys.first)) | (key >= static_cast<int32_t>(keys.last));
        store(scores(t) + j, hidden ? broadcast(-std::numeric_limits<float>::infinity()) : score);
      }
    }
  }

  // The queries times keys j, j + 1, ...
  COTERIE_INLINE void multiply(int64_t j, VF (&dots)[kQueries]) const {
    const float* const q = step.q + first * step.d;
    if (step.key_panels) {
      for (VF& dot : dots) dot = VF{};
      const int64_t width = 2 * kWidth;
      dot_columns<kQueries>(q, step.key_panels + j / width * width * step.d + j % width, step.d, 0, dots);
    } else {
      const Rows keys = {static_cast<decltype(Rows::rows)>(step.keys[j / kGroupRows]), step.d};
      for (int t = 0; t < kQueries; ++t) dots[t] = dot_rows(q + t * step.d, keys, j % kGroupRows, step.d);
    }
  }

  // The scores become weights, by the maximum so far; returns what corrects the earlier ones.
  float weigh(int t) const {
    VF maxima = broadcast(step.maxima[first + t]);
    for (int64_t j = first_key; j < last_key; j += kWidth) maxima = max(maxima, load(scores(t) + j));
    const float maximum = max_lanes(maxima);
    const float correction = exp(broadcast(step.maxima[first + t] - maximum))[0];  // 0 at the first run
    VF sums = {};
    for (int64_t j = first_key; j < last_key; j += kWidth) {
      if (t == 0) ask_for(step.next_values, j, step.value_stride);
      VF e = exp(load(scores(t) + j) - maximum);
      sums += e;
      if (step.value_factors) e *= load(step.value_factors[j / kGroupRows] + j % kGroupRows);
      store(scores(t) + j, e);
    }
    step.maxima[first + t] = maximum;
    step.sums[first + t] = step.sums[first + t] * correction + sum_lanes(sums);
    return correction;
  }

  // The keys that all of them see together; at both ends each one its own. (A weight of zero would not do: what it is
  // multiplied with may be infinite.)
  void add_values(float (&corrections)[kQueries]) const {
    const AttendStep::Keys shared = {seen[kQueries - 1].first, seen[0].last};
    if (shared.empty()) return add_own_values({0, step.n}, corrections);
    add_own_values({0, shared.first}, corrections);
    add_rows<kQueries, kQueries == 1 ? 8 : 4>(0, shared, corrections);
    add_own_values({shared.last, step.n}, corrections);
  }

  // Of the keys in `part` what each query sees.
  void add_own_values(AttendStep::Keys part, float (&corrections)[kQueries]) const {
    for (int t = 0; t < kQueries; ++t) {
      AttendStep::Keys own = seen[t];
      if (own.first < part.first) own.first = part.first;
      if (own.last > part.last) own.last = part.last;
      if (!own.empty()) add_rows<1, 8>(t, own, &corrections[t]);
    }
  }

  // out = out * correction + sum of scores[j] * values[j] for queries [t, t + kCount), kVectors vectors of dimensions
  // at a time. The corrections are made then, and become 1.
  template <int kCount, int kVectors>
  void add_rows(int t, AttendStep::Keys keys, float* corrections) const {
    int64_t i = 0;
    for (; i + kVectors * kWidth <= step.v; i += kVectors * kWidth) add_part<kCount, kVectors>(t, keys, corrections, i);
    if constexpr (kVectors > 4) {
      for (; i + 4 * kWidth <= step.v; i += 4 * kWidth) add_part<kCount, 4>(t, keys, corrections, i);
    }
    for (; i < step.v; i += kWidth) add_part<kCount, 1>(t, keys, corrections, i);
    for (int c = 0; c < kCount; ++c) corrections[c] = 1.0f;
  }

  template <int kCount, int kVectors>
  void add_part(int t, AttendStep::Keys keys, const float* corrections, int64_t i) const {
    VF sums[kCount][kVectors];
    float* const out = step.outs + (first + t) * step.v + i;
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[c][v] = load(out + c * step.v + v * kWidth) * corrections[c];
    }
    for (int64_t j = keys.first; j < keys.last;) {
      const Rows values = {static_cast<decltype(Rows::rows)>(step.values[j / kGroupRows]), step.value_stride};
      const int64_t group_end = (j / kGroupRows + 1) * kGroupRows, end = group_end < keys.last ? group_end : keys.last;
      for (; j < end; ++j) {
        VF row[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) row[v] = values.at(j % kGroupRows, i + v * kWidth);
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) {
          const VF weight = broadcast(scores(t + c)[j]);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sums[c][v] = fma(weight, row[v], sums[c][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(out + c * step.v + v * kWidth, sums[c][v]);
    }
  }
};

// Queries come by their positions: those that see keys of the run are neighbours.
template <typename Rows>
void attend_rows(const AttendStep& step) {
  int64_t first = 0, last = step.queries;
  while (first < last && step.seen(first).empty()) ++first;
  while (first < last && step.seen(last - 1).empty()) --last;
  for (; first + kTileQueries <= last; first += kTileQueries) QueryTile<Rows, kTileQueries>(step, first).attend();
  for (; first < last; ++first) QueryTile<Rows, 1>(step, first).attend();
}

void attend(const AttendStep& step) {
  if (step.dtype == DType::kBF16) return attend_rows<HalfRows>(step);
  if (step.dtype == DType::kI8) return attend_rows<ByteRows>(step);
  attend_rows<FloatRows>(step);
}
