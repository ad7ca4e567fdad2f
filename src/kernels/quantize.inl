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
    for (const LinearCodes& candidate : {start, fitted(values, mask, group, n, start)}) {
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

// 1 where a value is real.
COTERIE_INLINE void mark_real(int64_t n, int64_t group, float* mask) {
  for (int64_t i = 0; i < group; ++i) mask[i] = i < n ? 1.0f : 0.0f;
}

struct ScaleCodes {
  uint8_t scale = 0;
  int8_t minimum = 0;

  COTERIE_INLINE LinearCodes times(float factor) const {
    return {factor * static_cast<float>(scale), factor * static_cast<float>(kMinimumUnit * minimum)};
  }
};

// The best of those next to `wanted`, up or down.
COTERIE_INLINE ScaleCodes nearest_codes(const float* values, const float* mask, int64_t group,
                                        const LinearCodes& wanted, float factor) {
  ScaleCodes best;
  if (factor <= 0.0f) return best;
  float least = std::numeric_limits<float>::infinity();
  const float scale = wanted.scale / factor, minimum = wanted.minimum / (factor * kMinimumUnit);
  for (int up = 0; up < 4; ++up) {
    const float s = __builtin_floorf(scale) + static_cast<float>(up & 1),
                m = __builtin_floorf(minimum) + static_cast<float>(up >> 1);
    if (s > 255.0f || m > 127.0f) continue;
    const ScaleCodes codes = {static_cast<uint8_t>(s), static_cast<int8_t>(m)};
    const float error = squared_error(values, mask, group, codes.times(factor));
    if (!(error < least)) continue;
    least = error;
    best = codes;
  }
  return best;
}

void write_codes_int4(const float* values, int64_t group, const LinearCodes& line, int8_t* codes) {
  alignas(64) int8_t bytes[kMostGroup];
  for (int64_t i = 0; i < group; i += kWidth) {
    store_bytes(bytes + i, nearest(line.code(load(values + i), line.inverse())));
  }
  for (int64_t k = 0; k < group; k += 8) {
    for (int64_t j = 0; j < 4; ++j) codes[k / 2 + j] = static_cast<int8_t>(bytes[k + j] | bytes[k + 4 + j] << 4);
  }
}

// First what each group wants; then, in units that hold the largest of it, what it gets.
void quantize_row_int4(const void* row, DType dtype, int64_t K, PanelType type, const QuantizedRow& out) {
  const int64_t group = quantized_format(type).group;
  alignas(64) float values[kMostGroup], mask[kMostGroup];
  alignas(64) int8_t bytes[kMostGroup];
  float factor = 0.0f;
  for (int64_t k = 0, g = 0; k < K; k += group, ++g) {
    const int64_t n = K - k < group ? K - k : group;
    load_group(row, dtype, k, n, group, values);
    mark_real(n, group, mask);
    const LinearCodes wanted = best_codes(values, mask, group, n);
    out.workspace[2 * g] = wanted.scale;
    out.workspace[2 * g + 1] = wanted.minimum;
    const float of_scale = wanted.scale / 255.0f, of_minimum = __builtin_fabsf(wanted.minimum) / (127 * kMinimumUnit);
    factor = factor > of_scale ? factor : of_scale;
    factor = factor > of_minimum ? factor : of_minimum;
  }
  *out.factor = factor < kLeastMaximum ? 0.0f : factor;
  for (int64_t k = 0, g = 0; k < K; k += group, ++g) {
    const int64_t n = K - k < group ? K - k : group;
    load_group(row, dtype, k, n, group, values);
    mark_real(n, group, mask);
    const LinearCodes wanted = {out.workspace[2 * g], out.workspace[2 * g + 1]};
    const ScaleCodes codes = nearest_codes(values, mask, group, wanted, *out.factor);
    out.scale_codes[g] = codes.scale;
    out.minimum_codes[g] = codes.minimum;
    write_codes_int4(values, group, codes.times(*out.factor), bytes);
    __builtin_memcpy(reinterpret_cast<char*>(out.codes) + k / 2, bytes, static_cast<size_t>(units_of(type, n) * 2));
  }
}

void quantize_row_int8(const void* row, DType dtype, int64_t K, PanelType type, const QuantizedRow& out) {
  const int64_t group = quantized_format(type).group;
  alignas(64) float values[kMostGroup];
  alignas(64) int8_t bytes[kMostGroup];
  for (int64_t k = 0, g = 0; k < K; k += group, ++g) {
    const int64_t n = K - k < group ? K - k : group;
    const float most = load_group(row, dtype, k, n, group, values);
    quantize_group_int8(values, group, most, bytes, out.scales + g);
    __builtin_memcpy(reinterpret_cast<char*>(out.codes) + k, bytes, static_cast<size_t>(units_of(type, n) * 4));
  }
}

void quantize_weights_row(const void* row, DType dtype, int64_t K, PanelType type, const QuantizedRow& out) {
  if (quantized_format(type).stored_minimum) return quantize_row_int4(row, dtype, K, type, out);
  quantize_row_int8(row, dtype, K, type, out);
}
