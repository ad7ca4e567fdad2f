// Rounding groups of weights and of activations to codes. panels.h says what the types are.

COTERIE_INLINE VF to_floats(VI v) { return __builtin_convertvector(v, VF); }
COTERIE_INLINE void store_bytes(int8_t* p, VI v) {
  const VB bytes = __builtin_convertvector(v, VB);
  __builtin_memcpy(p, &bytes, kWidth);
}

constexpr int64_t kMostGroup = 128;
// Below this a group counts as zeros: its reciprocal would not be a number.
constexpr float kLeastMaximum = 1e-30f;

// n elements of a row from element `first` on as fp32, with zeros up to `group`. Returns the largest magnitude.
COTERIE_INLINE float load_group(const void* row, DType dtype, int64_t first, int64_t n, int64_t group, float* values) {
  VF most = {};
  for (int64_t i = 0; i < group; i += kWidth) {
    const int64_t left = n - i;
    const VF v = left > 0 ? load_any(row, dtype, first + i, left < kWidth ? left : kWidth) : VF{};
    store(values + i, v);
    most = max(most, magnitude(v));
  }
  return max_lanes(most);
}

// codes = offset + round(values / scale), as bytes; returns the sum of the rounded values.
COTERIE_INLINE int32_t round_group(const float* values, int64_t group, float inverse_scale, int32_t offset,
                                   int8_t* codes) {
  VI sum = {};
  for (int64_t i = 0; i < group; i += kWidth) {
    const VI rounded = nearest(load(values + i) * inverse_scale);
    sum += rounded;
    store_bytes(codes + i, rounded + offset);
  }
  return sum_lanes(sum);
}

// The same as 256 high + low.
COTERIE_INLINE int32_t round_group_wide(const float* values, int64_t group, float inverse_scale, int8_t* high,
                                        int8_t* low) {
  VI sum = {};
  for (int64_t i = 0; i < group; i += kWidth) {
    const VI rounded = nearest(load(values + i) * inverse_scale), upper = (rounded + 128) >> 8;
    sum += rounded;
    store_bytes(high + i, upper);
    store_bytes(low + i, rounded - (upper << 8));
  }
  return sum_lanes(sum);
}

struct LinearCodes {
  float scale = 0.0f, minimum = 0.0f;

  // The code of a value, 0 to 15.
  COTERIE_INLINE VF code(VF v, float inverse) const {
    const VF limited = max((v - minimum) * inverse, VF{});
    return to_floats(nearest(limited < 15.0f ? limited : broadcast(15.0f)));
  }
  COTERIE_INLINE float inverse() const { return scale > kLeastMaximum ? 1.0f / scale : 0.0f; }
  COTERIE_INLINE LinearCodes rounded() const { return {to_float(to_bfloat16(scale)), to_float(to_bfloat16(minimum))}; }
};

// The sum of the squared errors of n values, a multiple of kWidth. `mask` is 1 where a value is real.
COTERIE_INLINE float squared_error(const float* values, const float* mask, int64_t group, const LinearCodes& codes) {
  const float inverse = codes.inverse();
  VF sum = {};
  for (int64_t i = 0; i < group; i += kWidth) {
    const VF v = load(values + i), error = (codes.code(v, inverse) * codes.scale + codes.minimum - v) * load(mask + i);
    sum += error * error;
  }
  return sum_lanes(sum);
}

// The line through the values as a function of their codes under `codes` (least squares).
COTERIE_INLINE LinearCodes fitted(const float* values, const float* mask, int64_t group, int64_t n,
                                  const LinearCodes& codes) {
  const float inverse = codes.inverse();
  VF sum_q = {}, sum_qq = {}, sum_qv = {}, sum_v = {};
  for (int64_t i = 0; i < group; i += kWidth) {
    const VF m = load(mask + i), v = load(values + i) * m, q = codes.code(load(values + i), inverse) * m;
    sum_q += q;
    sum_qq += q * q;
    sum_qv += q * v;
    sum_v += v;
  }
  const float q = sum_lanes(sum_q), qq = sum_lanes(sum_qq), qv = sum_lanes(sum_qv), v = sum_lanes(sum_v);
  const auto count = static_cast<float>(n);
  const float spread = count * qq - q * q;
  if (spread <= 0.0f) return codes;
  LinearCodes line;
  line.scale = (count * qv - q * v) / spread;
  line.minimum = (v - line.scale * q) / count;
  return line.scale > kLeastMaximum ? line : codes;
}

// Rounding to 16 steps between the extremes errs by a twelfth of a squared step for all values alike; steps that are
// smaller, with the few extreme values cut off, are often better.
COTERIE_INLINE LinearCodes best_codes(const float* values, const float* mask, int64_t group, int64_t n) {
  constexpr float kInwards[] = {0.0f, 0.03f, 0.06f, 0.1f, 0.14f, 0.18f};  // of the range, on both sides together
  float low = values[0], high = values[0];
  for (int64_t i = 1; i < n; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  LinearCodes best;
  float least = std::numeric_limits<float>::infinity();
  for (const float inwards : kInwards) {
    const float range = high - low;
    const LinearCodes start = {range * (1.0f - inwards) / 15.0f, low + range * inwards / 2.0f};
    for (const LinearCodes& candidate : {start.rounded(), fitted(values, mask, group, n, start).rounded()}) {
      const float error = squared_error(values, mask, group, candidate);
      if (!(error < least)) continue;
      least = error;
      best = candidate;
    }
  }
  return best;
}

// A scale in bf16 that is not below `scale`, so that no code leaves its range.
COTERIE_INLINE BFloat16 scale_upwards(float scale) {
  const BFloat16 rounded = to_bfloat16(scale);
  return to_float(rounded) < scale ? BFloat16{static_cast<uint16_t>(rounded.bits + 1)} : rounded;
}

void quantize_group_int8(const float* values, int64_t group, float most, int8_t* codes, BFloat16* scale) {
  *scale = most < kLeastMaximum ? BFloat16{0} : scale_upwards(most / 127.0f);
  const float inverse = most < kLeastMaximum ? 0.0f : 1.0f / to_float(*scale);
  round_group(values, group, inverse, 128, codes);
}

void quantize_group_int4(const float* values, int64_t group, int64_t n, int8_t* codes, BFloat16* scale,
                         BFloat16* minimum) {
  alignas(64) float mask[kMostGroup];
  for (int64_t i = 0; i < group; ++i) mask[i] = i < n ? 1.0f : 0.0f;
  const LinearCodes best = best_codes(values, mask, group, n);
  *scale = to_bfloat16(best.scale);
  *minimum = to_bfloat16(best.minimum);
  alignas(64) int8_t bytes[kMostGroup];
  for (int64_t i = 0; i < group; i += kWidth) {
    store_bytes(bytes + i, nearest(best.code(load(values + i), best.inverse())));
  }
  for (int64_t k = 0; k < group; k += 8) {
    for (int64_t j = 0; j < 4; ++j) codes[k / 2 + j] = static_cast<int8_t>(bytes[k + j] | bytes[k + 4 + j] << 4);
  }
}

void quantize_weights_row(const void* row, DType dtype, int64_t K, PanelType type, uint32_t* codes, BFloat16* scales,
                          BFloat16* minimums) {
  const QuantizedFormat format = quantized_format(type);
  alignas(64) float values[kMostGroup];
  alignas(64) int8_t bytes[kMostGroup];
  for (int64_t k = 0, g = 0; k < K; k += format.group, ++g) {
    const int64_t n = K - k < format.group ? K - k : format.group;
    const float most = load_group(row, dtype, k, n, format.group, values);
    if (format.stored_minimum) {
      quantize_group_int4(values, format.group, n, bytes, scales + g, minimums + g);
    } else {
      quantize_group_int8(values, format.group, most, bytes, scales + g);
    }
    __builtin_memcpy(reinterpret_cast<char*>(codes) + k * format.bits / 8, bytes,
                     static_cast<size_t>(units_of(type, n) * 4 * format.bits / 8));
  }
}
