// The epilogue: a tile of sums gets bias, activation, gate, and C's type, while it is in the L1 cache.

struct StoreRow {
  const TileStore& s;
  const float* tile;
  int64_t row;

  COTERIE_INLINE VF sums(int64_t j, int64_t n, int half, const float* bias) const {
    const VF v = load(tile + row * 2 * kWidth + half * kWidth);
    return bias ? v + load_floats(bias, j, n) : v;
  }
  COTERIE_INLINE void keep_pre(int64_t j, int64_t n, VF v) const {
    if (s.pre) store_any(s.pre, s.pre_dtype, row * s.pre_stride + j, n, v);
  }
  COTERIE_INLINE void store_c(int64_t j, int64_t n, VF v) const {
    const int64_t at = row * s.c_stride + j;
    if (s.accumulate) v += load_any(s.c, s.c_dtype, at, n);
    if (s.stream && n == kWidth && streamed(at, v)) return;
    store_any(s.c, s.c_dtype, at, n, v);
  }
  COTERIE_INLINE bool streamed(int64_t at, VF v) const {
    const int64_t vector_bytes = s.c_dtype == DType::kBF16 ? kVectorBytes / 2 : kVectorBytes;
    if ((reinterpret_cast<uintptr_t>(s.c) + at * (vector_bytes / kWidth)) % vector_bytes != 0) return false;
    if (s.c_dtype == DType::kBF16) {
      stream_halves(static_cast<uint16_t*>(s.c) + at, round_to_bf16(v));
    } else {
      stream(static_cast<float*>(s.c) + at, v);
    }
    return true;
  }
};

void store_gated_row(const StoreRow& row) {
  const TileStore& s = row.s;
  const VF gate = row.sums(0, s.cols, 0, s.bias);
  const VF up = row.sums(0, s.cols, 1, s.bias_up);
  row.keep_pre(0, s.cols, gate);
  row.keep_pre(s.pre_up_offset, s.cols, up);
  row.store_c(0, s.cols, activation_value(s.activation, gate) * up);
}

void store_plain_row(const StoreRow& row) {
  const TileStore& s = row.s;
  for (int half = 0; half < 2; ++half) {
    const int64_t j = half * kWidth, n = lanes_left(j, s.cols);
    if (n <= 0) return;
    const VF v = row.sums(j, n, half, s.bias);
    row.keep_pre(j, n, v);
    row.store_c(j, n, s.activation == Activation::kNone ? v : activation_value(s.activation, v));
  }
}

// Nothing but sums, whole vectors of them, past the caches: gradients of weights are such, and the largest of all C.
template <bool kBf16>
void stream_sums(const TileStore& s) {
  for (int64_t r = 0; r < s.rows; ++r) {
    const float* const sums = s.tile + r * 2 * kWidth;
    for (int64_t j = 0; j < s.cols; j += kWidth) {
      if constexpr (kBf16) {
        stream_halves(static_cast<uint16_t*>(s.c) + r * s.c_stride + j, round_to_bf16(load(sums + j)));
      } else {
        stream(static_cast<float*>(s.c) + r * s.c_stride + j, load(sums + j));
      }
    }
  }
}
bool is_streamed_sums(const TileStore& s) {
  const int64_t vector_bytes = s.c_dtype == DType::kBF16 ? kVectorBytes / 2 : kVectorBytes;
  return s.stream && !s.gated && !s.pre && !s.bias && !s.accumulate && s.activation == Activation::kNone &&
         s.cols % kWidth == 0 && s.c_stride % kWidth == 0 && reinterpret_cast<uintptr_t>(s.c) % vector_bytes == 0;
}

void store_tile(const TileStore& s) {
  if (is_streamed_sums(s)) return s.c_dtype == DType::kBF16 ? stream_sums<true>(s) : stream_sums<false>(s);
  for (int64_t r = 0; r < s.rows; ++r) {
    const StoreRow row{s, s.tile, r};
    if (s.gated) {
      store_gated_row(row);
    } else {
      store_plain_row(row);
    }
  }
}
