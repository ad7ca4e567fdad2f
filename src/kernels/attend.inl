// Queries against a run of keys, merged into their running softmaxes (the online form of Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018). A few queries at a time share what is read of keys and values;
// what becomes of one does not depend on the others, nor on how the keys lie.

constexpr int64_t kGroupRows = AttendStep::kGroupRows, kRunKeys = AttendStep::kRunKeys;
constexpr int kTileQueries = kVectorBytes == 64 ? 4 : 2;
static_assert(kTileQueries <= AttendStep::kMostTileQueries);
constexpr int64_t kPanelWidth = 2 * kWidth;
static_assert(AttendStep::kPadding % kPanelWidth == 0);

// What queries and keys, and weights and values, are multiplied as: units of 32 bits, which hold one number or two.

struct FloatUnits {
  using Element = float;  // of a cache
  using Sum = VF;
  static constexpr int64_t kHeld = 1;
  static constexpr bool kExact = false;

  // Consecutive elements.
  static COTERIE_INLINE VU along(const Element* row) { return load_units(row); }
  static COTERIE_INLINE VF multiply_add(VU a, VU b, VF sum) {
    return fma(reinterpret_cast<VF>(a), reinterpret_cast<VF>(b), sum);
  }
  // Weights take the place of scores: those of keys j, j + 1, ..., and when all of keys [first, last) are there what is
  // left to make units of them. Returns what sums of their products are multiplied with.
  static COTERIE_INLINE void store_weights(float* scores, int64_t j, VF weights) { store(scores + j, weights); }
  static COTERIE_INLINE float round_weights(float*, int64_t, int64_t) { return 1.0f; }
};

// bf16.
struct HalfUnits {
  using Element = uint16_t;
  using Sum = VF;
  static constexpr int64_t kHeld = 2;
  static constexpr bool kExact = false;

  static COTERIE_INLINE VU along(const Element* row) { return load_units(row); }
  static COTERIE_INLINE VF multiply_add(VU a, VU b, VF sum) { return multiply_add_bf16(a, b, sum); }
  static COTERIE_INLINE void store_weights(float* scores, int64_t j, VF weights) {
    store_rounded(reinterpret_cast<uint16_t*>(scores) + j, weights);
  }
  static COTERIE_INLINE float round_weights(float*, int64_t, int64_t) { return 1.0f; }
};

// Integers: of 8 bits in the cache, of 16 for queries and weights. Sums are exact, in whatever order.
struct IntegerUnits {
  using Element = int8_t;
  using Sum = VI;
  static constexpr int64_t kHeld = 2;
  static constexpr bool kExact = true;

  static COTERIE_INLINE VU along(const Element* row) { return load_byte_pairs(row); }
  static COTERIE_INLINE VI multiply_add(VU a, VU b, VI sum) { return multiply_add_halves(a, b, sum); }
  static COTERIE_INLINE void store_weights(float* scores, int64_t j, VF weights) { store(scores + j, weights); }
  static COTERIE_INLINE float round_weights(float* weights, int64_t first, int64_t last) {
    constexpr float kLargest = 32767.0f;
    static_assert(kRunKeys * 32767 * 127 <= std::numeric_limits<int32_t>::max());
    VF most = {};
    for (int64_t j = first; j < last; j += kWidth) most = max(most, load(weights + j));
    const float largest = max_lanes(most), inverse = largest > kLeastMaximum ? kLargest / largest : 0.0f;
    auto* const halves = reinterpret_cast<uint16_t*>(weights);
    for (int64_t j = first; j < last; j += kWidth) {
      store_halves(halves + j, reinterpret_cast<VU>(nearest(load(weights + j) * inverse)) << 16);
    }
    return largest / kLargest;
  }
};

COTERIE_INLINE VF as_floats(VF sums) { return sums; }
COTERIE_INLINE VF as_floats(VI sums) { return to_floats(sums); }

// The units of kPanelWidth columns, each of one row, or of one and the next.
template <typename Units>
COTERIE_INLINE void across(const typename Units::Element* row, int64_t stride, VU* units) {
  if constexpr (Units::kHeld == 1) {
    units[0] = Units::along(row);
    units[1] = Units::along(row + kWidth);
  } else {
    interleave_pairs(Units::along(row), Units::along(row + stride), units);
  }
}

// Lane r of the result is q . keys[r]: each lane of q has a sum of its own, and then halves of them are added.
template <typename Units>
COTERIE_INLINE auto dot_rows(const uint32_t* q, const typename Units::Element* keys, int64_t d) {
  typename Units::Sum sums[kWidth] = {};
  for (int64_t i = 0; i < d; i += Units::kHeld * kWidth, q += kWidth) {
    const VU part = load_units(q);
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) sums[r] = Units::multiply_add(part, Units::along(keys + r * d + i), sums[r]);
  }
  return sum_each(sums);
}

// The same of two queries, for which every key is read once: half of the keys at a time.
template <typename Units>
COTERIE_INLINE void dot_rows(const uint32_t* q0, const uint32_t* q1, const typename Units::Element* keys, int64_t d,
                             typename Units::Sum (&dots)[2]) {
  constexpr int kHalf = kWidth / 2;
  for (auto& dot : dots) {
    typename Units::Sum sums[kWidth] = {};
    const typename Units::Element* row = keys;
    for (int64_t i = 0; i < d; i += Units::kHeld * kWidth, row += Units::kHeld * kWidth) {
      const VU part0 = load_units(q0 + i / Units::kHeld), part1 = load_units(q1 + i / Units::kHeld);
#pragma GCC unroll 8
      for (int r = 0; r < kHalf; ++r) {
        const VU key = Units::along(row + r * d);
        sums[r] = Units::multiply_add(part0, key, sums[r]);
        sums[kHalf + r] = Units::multiply_add(part1, key, sums[kHalf + r]);
      }
    }
    dot = sum_each(sums);
    keys += kHalf * d;
  }
  const typename Units::Sum first = shuffle<LowBlocks<kHalf>>(dots[0], dots[1]);
  dots[1] = shuffle<HighBlocks<kHalf>>(dots[0], dots[1]);
  dots[0] = first;
}

// The same sums of keys that are columns of a panel, in the same order: those of units lane, lane + kStep, ...
template <typename Units, int kQueries, int kStep = 1>
COTERIE_INLINE void dot_columns(const uint32_t* q, const uint32_t* keys, int64_t units, int lane,
                                typename Units::Sum (&sums)[kQueries]) {
  if constexpr (kStep == kWidth || Units::kExact) {
    for (int64_t u = lane; u < units; u += kStep) {
      const VU part = load_units(keys + u * kPanelWidth);
#pragma GCC unroll 4
      for (int t = 0; t < kQueries; ++t) {
        sums[t] = Units::multiply_add(broadcast_unit(q[t * units + u]), part, sums[t]);
      }
    }
  } else {
    typename Units::Sum others[kQueries] = {};
    dot_columns<Units, kQueries, 2 * kStep>(q, keys, units, lane, sums);
    dot_columns<Units, kQueries, 2 * kStep>(q, keys, units, lane + kStep, others);
#pragma GCC unroll 4
    for (int t = 0; t < kQueries; ++t) sums[t] += others[t];
  }
}

// Queries [first, first + kQueries) of a step, each of which sees a key; keys and values where they lie in the cache,
// or as panels.
template <typename Units, bool kInPlace, int kQueries>
struct QueryTile {
  using Element = typename Units::Element;
  using Sum = typename Units::Sum;
  static constexpr int64_t kHeld = Units::kHeld;

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
    Factors factors[kQueries];
    score();
    for (int t = 0; t < kQueries; ++t) factors[t] = weigh(t);
    if constexpr (Units::kExact) {  // what a query does not see has a weight of zero
      add_units<kQueries>(0, {first_key / kHeld, (last_key + kHeld - 1) / kHeld}, factors);
    } else {
      add_values(factors);
    }
  }

 private:
  // Of what a query has so far, and of what comes.
  struct Factors {
    float correction = 1.0f, scale = 1.0f;
  };

  float* scores(int t) const { return step.scores + t * kRunKeys; }
  const uint32_t* weights(int t) const { return reinterpret_cast<const uint32_t*>(scores(t)); }
  int64_t query_units() const { return step.d / kHeld; }

  // What comes is asked for by the first queries, a little at a time (many lines at once would only wait for each
  // other), and nobody reads it a second time soon.
  COTERIE_INLINE void ask_for_rows(const AttendStep::Coming& coming, int64_t j, int64_t count) const {
    const char* const rows = coming_rows(coming, j);
    if (!rows) return;
    for (int64_t i = 0; i < count * coming.row_bytes; i += 64) ask_for</*kOnce=*/true>(rows + i);
  }
  COTERIE_INLINE const char* coming_rows(const AttendStep::Coming& coming, int64_t j) const {
    if (!coming.groups || !coming.groups[j / kGroupRows] || first > 0) return nullptr;
    return static_cast<const char*>(coming.groups[j / kGroupRows]) + j % kGroupRows * coming.row_bytes;
  }
  COTERIE_INLINE void ask_for_factors(const AttendStep::Coming& coming, int64_t j) const {
    if (!coming.factors || !coming.factors[j / kGroupRows] || first > 0) return;
    ask_for</*kOnce=*/true>(coming.factors[j / kGroupRows] + j % kGroupRows);
  }

  // scores[j] = scale * q . keys[j] (times what q and the key are multiplied with), -infinity where the query does not
  // see the key.
  void score() const {
    const VI lanes = shuffle_mask<Lanes>(std::make_integer_sequence<int, kWidth>());
    for (int64_t j = first_key; j < last_key; j += kWidth) {
      Sum dots[kQueries];
      multiply(j, dots);
      if constexpr (kInPlace) {
        ask_for_rows(step.while_scoring, j, kWidth);
        ask_for_factors(step.while_scoring, j);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kQueries; ++t) {
        VF score = as_floats(dots[t]) * (step.q_factors ? step.scale * step.q_factors[first + t] : step.scale);
        if (step.key_factors) score *= load(step.key_factors[j / kGroupRows] + j % kGroupRows);
        const VI key = lanes + static_cast<int32_t>(j);
        const AttendStep::Keys keys = seen[t];
        const VI hidden = (key < static_cast<int32_t>(keys.first)) | (key >= static_cast<int32_t>(keys.last));
        store(scores(t) + j, hidden ? broadcast(-std::numeric_limits<float>::infinity()) : score);
      }
    }
  }

  // The queries times keys j, j + 1, ...
  COTERIE_INLINE void multiply(int64_t j, Sum (&dots)[kQueries]) const {
    const uint32_t* const q = step.q + first * query_units();
    if constexpr (kInPlace) {
      const Element* const keys = static_cast<const Element*>(step.keys[j / kGroupRows]) + j % kGroupRows * step.d;
      const int64_t units = query_units();
      int t = 0;
      for (; t + 2 <= kQueries; t += 2) {
        Sum two[2];
        dot_rows<Units>(q + t * units, q + (t + 1) * units, keys, step.d, two);
        dots[t] = two[0];
        dots[t + 1] = two[1];
      }
      if (t < kQueries) dots[t] = dot_rows<Units>(q + t * units, keys, step.d);
    } else {
      for (Sum& dot : dots) dot = Sum{};
      const uint32_t* const keys = step.key_panels + j / kPanelWidth * step.key_panel_units + j % kPanelWidth;
      dot_columns<Units, kQueries>(q, keys, query_units(), 0, dots);
    }
  }

  // The scores become weights, by the maximum so far.
  Factors weigh(int t) const {
    VF maxima = broadcast(step.maxima[first + t]);
    for (int64_t j = first_key; j < last_key; j += kWidth) maxima = max(maxima, load(scores(t) + j));
    const float maximum = max_lanes(maxima);
    Factors factors;
    factors.correction = exp_up_to_zero(broadcast(step.maxima[first + t] - maximum))[0];  // 0 at the first run
    VF sums = {};
    for (int64_t j = first_key; j < last_key; j += kWidth) {
      if constexpr (kInPlace) {
        if (t == 0) ask_for_factors(step.while_adding, j);
      }
      VF e = exp_up_to_zero(load(scores(t) + j) - maximum);
      sums += e;
      if (step.value_factors) {  // which may be anything where no key was stored
        e = e > 0.0f ? e * load(step.value_factors[j / kGroupRows] + j % kGroupRows) : VF{};
      }
      Units::store_weights(scores(t), j, e);
    }
    step.maxima[first + t] = maximum;
    step.sums[first + t] = step.sums[first + t] * factors.correction + sum_lanes(sums);
    factors.scale = Units::round_weights(scores(t), first_key, last_key);
    return factors;
  }

  struct Range {
    int64_t first = 0, last = 0;  // of units
    bool empty() const { return first >= last; }
  };

  // The units that all of them see together; at both ends each one its own. (A weight of zero would not do: what it is
  // multiplied with may be infinite.)
  void add_values(Factors (&factors)[kQueries]) const {
    const Range shared = {(seen[kQueries - 1].first + kHeld - 1) / kHeld, seen[0].last / kHeld};
    if (shared.empty()) return add_own_values({0, kRunKeys}, factors);
    add_own_values({0, shared.first}, factors);
    add_units<kQueries>(0, shared, factors);
    add_own_values({shared.last, kRunKeys}, factors);
  }

  // Of the units in `part` what each query sees.
  void add_own_values(Range part, Factors (&factors)[kQueries]) const {
    for (int t = 0; t < kQueries; ++t) {
      Range own = {seen[t].first / kHeld, (seen[t].last + kHeld - 1) / kHeld};
      if (own.first < part.first) own.first = part.first;
      if (own.last > part.last) own.last = part.last;
      if (!own.empty()) add_units<1, /*kMasked=*/kHeld != 1>(t, own, &factors[t]);
    }
  }

  // out = out * correction + scale * sum of weights * values for queries [t, t + kCount), of a few panels of dimensions
  // at a time. The corrections are made then, and become 1.
  template <int kCount, bool kMasked = false>
  void add_units(int t, Range units, Factors* factors) const {
    int64_t i = 0;
    if constexpr (kCount == 1) {
      for (; i + 4 * kPanelWidth <= step.v; i += 4 * kPanelWidth) add_part<kCount, 4, kMasked>(t, units, factors, i);
    }
    for (; i + 2 * kPanelWidth <= step.v; i += 2 * kPanelWidth) add_part<kCount, 2, kMasked>(t, units, factors, i);
    for (; i < step.v; i += kPanelWidth) add_part<kCount, 1, kMasked>(t, units, factors, i);
    for (int c = 0; c < kCount; ++c) factors[c].correction = 1.0f;
  }

  template <int kCount, int kPanels, bool kMasked>
  void add_part(int t, Range units, const Factors* factors, int64_t i) const {
    constexpr int kVectors = 2 * kPanels;
    Sum sums[kCount][kVectors] = {};
    float* const outs = step.outs + (first + t) * step.v + i;
    const auto corrected = [&](int c, int v) { return load(outs + c * step.v + v * kWidth) * factors[c].correction; };
    if constexpr (!Units::kExact) {
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[c][v] = corrected(c, v);
      }
    }
    for (int64_t u = units.first; u < units.last; ++u) {
      VU values[kVectors];
      load_values<kPanels>(u, i, values);
      if constexpr (kInPlace) {
        if (i == 0) ask_for_rows(step.while_adding, u * kHeld, kHeld);
      }
      if constexpr (kMasked) hide(u, seen[t], values);
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) {
        const VU weight = broadcast_unit(weights(t + c)[u]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[c][v] = Units::multiply_add(weight, values[v], sums[c][v]);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        VF out = as_floats(sums[c][v]);
        if constexpr (Units::kExact) out = fma(out, broadcast(factors[c].scale), corrected(c, v));
        store(outs + c * step.v + v * kWidth, out);
      }
    }
  }

  // Of unit u, dimensions i, i + 1, ...
  template <int kPanels>
  COTERIE_INLINE void load_values(int64_t u, int64_t i, VU (&values)[2 * kPanels]) const {
    const auto j = static_cast<uint64_t>(u * kHeld);  // unsigned: a shift and a mask
    const Element* const row = kInPlace ? static_cast<const Element*>(step.values[j / kGroupRows]) +
                                              static_cast<int64_t>(j % kGroupRows) * step.value_stride + i
                                        : nullptr;
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      if constexpr (kInPlace) {
        across<Units>(row + p * kPanelWidth, step.value_stride, values + 2 * p);
      } else {
        const uint32_t* const panel =
            step.value_panels + (i / kPanelWidth + p) * step.value_panel_units + u * kPanelWidth;
        values[2 * p] = load_units(panel);
        values[2 * p + 1] = load_units(panel + kWidth);
      }
    }
  }

  // Zeros in the place of a value whose key is not seen.
  template <int kVectors>
  static COTERIE_INLINE void hide(int64_t u, AttendStep::Keys keys, VU (&values)[kVectors]) {
    const uint32_t low = 2 * u >= keys.first ? 0xffffu : 0u, high = 2 * u + 1 < keys.last ? 0xffff0000u : 0u;
    for (VU& value : values) value &= low | high;
  }
};

// Queries come by their positions: those that see keys of the run are neighbours.
template <typename Units, bool kInPlace>
void attend_tiles(const AttendStep& step) {
  int64_t first = 0, last = step.queries;
  while (first < last && step.seen(first).empty()) ++first;
  while (first < last && step.seen(last - 1).empty()) --last;
  for (; first + kTileQueries <= last; first += kTileQueries) {
    QueryTile<Units, kInPlace, kTileQueries>(step, first).attend();
  }
  // The last ones, fewer than a tile, which has at most four.
  if (first + 1 == last) return QueryTile<Units, kInPlace, 1>(step, first).attend();
  if constexpr (kTileQueries > 2) {
    if (first + 2 == last) return QueryTile<Units, kInPlace, 2>(step, first).attend();
  }
  if constexpr (kTileQueries > 3) {
    if (first + 3 == last) return QueryTile<Units, kInPlace, 3>(step, first).attend();
  }
}

template <typename Units>
void attend_units(const AttendStep& step) {
  return step.key_panels ? attend_tiles<Units, false>(step) : attend_tiles<Units, true>(step);
}

void attend(const AttendStep& step) {
  if (step.dtype == DType::kBF16) return attend_units<HalfUnits>(step);
  if (step.dtype == DType::kI8) return attend_units<IntegerUnits>(step);
  attend_units<FloatUnits>(step);
}
