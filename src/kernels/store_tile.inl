// The epilogue: a tile of sums gets bias, activation, gate, and C's type, while it is in the L1 cache. What would be
// asked for every vector is known at compile time.

template <bool kBf16>
COTERIE_INLINE void store_as(void* p, int64_t i, int64_t n, VF v) {
  store_any(p, kBf16 ? DType::kBF16 : DType::kF32, i, n, v);
}
template <bool kBf16>
COTERIE_INLINE void stream_as(void* p, int64_t i, VF v) {
  if constexpr (kBf16) return stream_halves(static_cast<uint16_t*>(p) + i, round_to_bf16(v));
  stream(static_cast<float*>(p) + i, v);
}
template <bool kBf16>
bool may_stream(const TileStore& s) {
  return s.stream && reinterpret_cast<uintptr_t>(s.c) % (kBf16 ? kVectorBytes / 2 : kVectorBytes) == 0 &&
         s.c_stride % kWidth == 0;
}

// kWhole: the columns are whole vectors.
template <bool kBf16, bool kWhole, bool kGated, Activation kActivation>
void store_rows(const TileStore& s) {
  const bool past_caches = kWhole && may_stream<kBf16>(s);
  for (int64_t r = 0; r < s.rows; ++r) {
    const float* const sums = s.tile + r * 2 * kWidth;
    for (int64_t j = 0; j < s.cols; j += kWidth) {
      const int64_t n = kWhole ? kWidth : lanes_left(j, s.cols), at = r * s.c_stride + j, pre_at = r * s.pre_stride + j;
      VF v = load(sums + j), up = kGated ? load(sums + kWidth) : VF{};
      if (s.bias) {
        v += load_floats(s.bias, j, n);
        if (kGated) up += load_floats(s.bias_up, j, n);
      }
      if (s.pre) {
        store_as<kBf16>(s.pre, pre_at, n, v);
        if (kGated) store_as<kBf16>(s.pre, pre_at + s.pre_up_offset, n, up);
      }
      v = activation_value(kActivation, v);
      if (kGated) v *= up;
      if (s.accumulate) v += load_any(s.c, s.c_dtype, at, n);
      if (past_caches) {
        stream_as<kBf16>(s.c, at, v);
      } else {
        store_as<kBf16>(s.c, at, n, v);
      }
    }
  }
}

template <bool kBf16, bool kWhole, bool kGated>
void store_activated(const TileStore& s) {
  switch (s.activation) {
    case Activation::kNone:
      return store_rows<kBf16, kWhole, kGated, Activation::kNone>(s);
    case Activation::kRelu:
      return store_rows<kBf16, kWhole, kGated, Activation::kRelu>(s);
    case Activation::kGelu:
      return store_rows<kBf16, kWhole, kGated, Activation::kGelu>(s);
    case Activation::kGeluTanh:
      return store_rows<kBf16, kWhole, kGated, Activation::kGeluTanh>(s);
    case Activation::kSilu:
      return store_rows<kBf16, kWhole, kGated, Activation::kSilu>(s);
  }
}

template <bool kBf16>
void store_tile_as(const TileStore& s) {
  const bool whole = s.cols % kWidth == 0;
  if (s.gated) return whole ? store_activated<kBf16, true, true>(s) : store_activated<kBf16, false, true>(s);
  return whole ? store_activated<kBf16, true, false>(s) : store_activated<kBf16, false, false>(s);
}

void store_tile(const TileStore& s) {
  return s.c_dtype == DType::kBF16 ? store_tile_as<true>(s) : store_tile_as<false>(s);
}
