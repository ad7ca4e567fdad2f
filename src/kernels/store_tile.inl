// The epilogue: a tile of sums gets bias, activation, gate, and C's type, while it is in the L1 cache. What would be
// asked for every vector is known at compile time.

// A row's part in memory: kVectors whole vectors, or, when that is 0, one of n elements.
template <bool kBf16, int kVectors>
struct RowMemory {
  static constexpr int kCount = kVectors ? kVectors : 1;
  char* row;
  int64_t n;

  static constexpr DType type() { return kBf16 ? DType::kBF16 : DType::kF32; }
  COTERIE_INLINE void add_to(VF (&v)[kCount]) const {
    for (int i = 0; i < kCount; ++i) v[i] += load_any(row, type(), i * kWidth, kVectors ? kWidth : n);
  }
  COTERIE_INLINE void store(const VF (&v)[kCount]) const {
    auto* const halves = reinterpret_cast<uint16_t*>(row);
    if constexpr (kBf16 && kVectors == 2) return store_rounded(halves, v[0], v[1]);
    if constexpr (kBf16 && kVectors == 1) return store_rounded(halves, v[0]);
    for (int i = 0; i < kCount; ++i) store_any(row, type(), i * kWidth, kVectors ? kWidth : n, v[i]);
  }
  COTERIE_INLINE void stream(const VF (&v)[kCount]) const {  // past the caches
    if constexpr (kBf16) {
      auto* const halves = reinterpret_cast<uint16_t*>(row);
      if constexpr (kVectors == 2) return stream_rounded(halves, v[0], v[1]);
      return stream_rounded(halves, v[0]);
    }
    for (int i = 0; i < kCount; ++i) stream_floats(reinterpret_cast<float*>(row) + i * kWidth, v[i]);
  }
  COTERIE_INLINE void put(const VF (&v)[kCount], bool past_caches) const { past_caches ? stream(v) : store(v); }
  // Whether rows from `first` on, so many bytes (or several distances, joined by |) apart, are where stream() may
  // write.
  static bool streams(const char* first, int64_t row_bytes) {
    constexpr int64_t kAlignment = kBf16 ? kVectorBytes / 2 * kCount : kVectorBytes;
    return kVectors && (reinterpret_cast<intptr_t>(first) | row_bytes) % kAlignment == 0;
  }
};

// A vector of the sums of a row, with bias.
COTERIE_INLINE VF biased(const float* sums, const float* bias, int64_t n) {
  return bias ? load(sums) + load_any(bias, DType::kF32, 0, n) : load(sums);
}

template <bool kBf16, int kVectors, bool kGated, Activation kActivation>
void store_rows(const TileStore& s, int64_t column, int64_t n) {
  using Memory = RowMemory<kBf16, kVectors>;
  constexpr int64_t kBytes = kBf16 ? 2 : 4;
  char* const c = static_cast<char*>(s.c) + column * kBytes;
  char* const slopes = s.slopes ? static_cast<char*>(s.slopes) + column * kBytes : nullptr;
  const bool stream = s.stream && Memory::streams(c, s.c_stride * kBytes);
  const bool stream_slopes = stream && Memory::streams(slopes, (s.slopes_stride | s.slopes_up_offset) * kBytes);
  for (int64_t r = 0; r < s.rows; ++r) {
    const float* const sums = s.tile + r * 2 * kWidth + column;
    VF v[Memory::kCount], slope[Memory::kCount], slope_up[Memory::kCount];
    for (int i = 0; i < Memory::kCount; ++i) {
      const Activated f =
          activated(kActivation, biased(sums + i * kWidth, s.bias ? s.bias + column + i * kWidth : nullptr, n));
      const VF up = kGated ? gated_factor(kActivation, biased(sums + kWidth, s.bias_up, n)) : VF{};
      v[i] = kGated ? f.value * up : f.value;
      slope[i] = kGated ? f.slope * up : f.slope;
      slope_up[i] = f.value;
    }
    if (slopes) {
      char* const row = slopes + r * s.slopes_stride * kBytes;
      Memory{row, n}.put(slope, stream_slopes);
      if (kGated) Memory{row + s.slopes_up_offset * kBytes, n}.put(slope_up, stream_slopes);
    }
    const Memory out = {c + r * s.c_stride * kBytes, n};
    if (s.accumulate) out.add_to(v);
    out.put(v, stream);
  }
}

// Both vectors of a tile at once where they are whole, else one after the other.
template <bool kBf16, bool kGated, Activation kActivation>
void store_columns(const TileStore& s) {
  if (!kGated && s.cols == 2 * kWidth) return store_rows<kBf16, 2, kGated, kActivation>(s, 0, kWidth);
  for (int64_t column = 0; column < s.cols; column += kWidth) {
    const int64_t n = lanes_left(column, s.cols);
    if (n == kWidth) {
      store_rows<kBf16, 1, kGated, kActivation>(s, column, n);
    } else {
      store_rows<kBf16, 0, kGated, kActivation>(s, column, n);
    }
  }
}

template <bool kBf16, bool kGated>
void store_activated(const TileStore& s) {
  switch (s.activation) {
    case Activation::kNone:
      return store_columns<kBf16, kGated, Activation::kNone>(s);
    case Activation::kRelu:
      return store_columns<kBf16, kGated, Activation::kRelu>(s);
    case Activation::kGelu:
      return store_columns<kBf16, kGated, Activation::kGelu>(s);
    case Activation::kGeluTanh:
      return store_columns<kBf16, kGated, Activation::kGeluTanh>(s);
    case Activation::kSilu:
      return store_columns<kBf16, kGated, Activation::kSilu>(s);
    case Activation::kClampedSwiglu:
      return store_columns<kBf16, kGated, Activation::kClampedSwiglu>(s);
  }
}

void store_tile(const TileStore& s) {
  if (s.c_dtype == DType::kBF16) return s.gated ? store_activated<true, true>(s) : store_activated<true, false>(s);
  s.gated ? store_activated<false, true>(s) : store_activated<false, false>(s);
}
