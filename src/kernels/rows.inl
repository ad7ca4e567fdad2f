// Rows of fp32 or bf16: loading, storing, converting, norms, softmax, rotation.

// Vectors of n <= kWidth elements from element i on, in either type.
COTERIE_INLINE VF load_any(const void* p, DType dtype, int64_t i, int64_t n) {
  if (dtype == DType::kBF16) {
    const uint16_t* halves = static_cast<const uint16_t*>(p) + i;
    return reinterpret_cast<VF>((n == kWidth ? load_halves(halves) : load_halves_part(halves, n)) << 16);
  }
  const float* floats = static_cast<const float*>(p) + i;
  return n == kWidth ? load(floats) : load_part(floats, n);
}
COTERIE_INLINE void store_any(void* p, DType dtype, int64_t i, int64_t n, VF v) {
  if (dtype == DType::kBF16) {
    uint16_t* halves = static_cast<uint16_t*>(p) + i;
    const VU rounded = round_to_bf16(v);
    if (n == kWidth) return store_halves(halves, rounded);
    return store_halves_part(halves, rounded, n);
  }
  float* floats = static_cast<float*>(p) + i;
  if (n == kWidth) return store(floats, v);
  store_part(floats, v, n);
}
COTERIE_INLINE int64_t lanes_left(int64_t i, int64_t n) { return n - i < kWidth ? n - i : kWidth; }
COTERIE_INLINE VF load_floats(const float* p, int64_t i, int64_t n) { return load_any(p, DType::kF32, i, n); }
COTERIE_INLINE void store_floats(float* p, int64_t i, int64_t n, VF v) { store_any(p, DType::kF32, i, n, v); }

void convert_row(const void* in, DType in_dtype, void* out, DType out_dtype, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(i, n);
    store_any(out, out_dtype, i, m, load_any(in, in_dtype, i, m));
  }
}

// out = in / factor, rounded to the nearest integer, the largest of which is `largest`; returns the factor.
template <typename Code>
COTERIE_INLINE float quantize_row_as(const float* in, int64_t n, float largest, Code* out) {
  typedef Code Codes __attribute__((vector_size(kWidth * sizeof(Code))));
  VF most = {};
  for (int64_t i = 0; i < n; i += kWidth) most = max(most, magnitude(load_floats(in, i, lanes_left(i, n))));
  const float factor = max_lanes(most) / largest;
  const float inverse = factor > 0.0f ? 1.0f / factor : 0.0f;
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(i, n);
    const Codes codes = __builtin_convertvector(nearest(load_floats(in, i, m) * inverse), Codes);
    __builtin_memcpy(out + i, &codes, static_cast<size_t>(m) * sizeof(Code));
  }
  return factor;
}

float quantize_row(const float* in, int64_t n, int8_t* out) { return quantize_row_as(in, n, 127.0f, out); }
float quantize_row_wide(const float* in, int64_t n, int32_t largest, int16_t* out) {
  return quantize_row_as(in, n, static_cast<float>(largest), out);
}

void widen_row(const int8_t* in, int64_t n, int16_t* out) {
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth)
    store_units(reinterpret_cast<uint32_t*>(out + i), load_byte_pairs(in + i));
  for (; i < n; ++i) out[i] = in[i];
}

void scale_row(const void* in, DType in_dtype, float scale, void* out, DType out_dtype, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(i, n);
    store_any(out, out_dtype, i, m, load_any(in, in_dtype, i, m) * scale);
  }
}

void add_row(const void* in, DType dtype, float* sum, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(i, n);
    store_floats(sum, i, m, load_floats(sum, i, m) + load_any(in, dtype, i, m));
  }
}

float dot_row(const void* a, DType a_dtype, const float* b, int64_t n) {
  VF sum = {};
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(i, n);
    sum = fma(load_any(a, a_dtype, i, m), load_floats(b, i, m), sum);
  }
  return sum_lanes(sum);
}

void combine_rows(const float* const* rows, const float* weights, int64_t count, void* out, DType dtype, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(i, n);
    VF sum = {};
    for (int64_t r = 0; r < count; ++r) sum = fma(broadcast(weights[r]), load_floats(rows[r], i, m), sum);
    store_any(out, dtype, i, m, sum);
  }
}

void rms_norm_row(const float* x, const float* weight, float eps, int64_t D, float* out) {
  VF squares = {};
  for (int64_t i = 0; i < D; i += kWidth) {
    const VF v = load_floats(x, i, lanes_left(i, D));
    squares = fma(v, v, squares);
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(D) + eps);
  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t m = lanes_left(i, D);
    store_floats(out, i, m, load_floats(x, i, m) * scale * load_floats(weight, i, m));
  }
}

// With r = 1 / sqrt(mean(x^2) + eps) and g = grad * weight: grad_x = r (g - x r^2 mean(g x)).
void rms_norm_backward_row(const float* x, const float* weight, const float* grad, float eps, int64_t D, float* grad_x,
                           float* grad_weight_sum) {
  VF squares = {}, products = {};
  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t m = lanes_left(i, D);
    const VF v = load_floats(x, i, m);
    squares = fma(v, v, squares);
    products = fma(load_floats(grad, i, m) * load_floats(weight, i, m), v, products);
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(D) + eps);
  const float along_x = scale * scale * sum_lanes(products) / static_cast<float>(D);
  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t m = lanes_left(i, D);
    const VF v = load_floats(x, i, m), g = load_floats(grad, i, m);
    store_floats(grad_weight_sum, i, m, fma(g, v * scale, load_floats(grad_weight_sum, i, m)));
    store_floats(grad_x, i, m, (g * load_floats(weight, i, m) - v * along_x) * scale);
  }
}

void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, int64_t D, float* out) {
  VF sum = {};
  for (int64_t i = 0; i < D; i += kWidth) sum += load_floats(x, i, lanes_left(i, D));
  const float mean = sum_lanes(sum) / static_cast<float>(D);
  VF squares = {};  // of the centred values: no cancellation, unlike mean(x^2) - mean(x)^2
  int64_t i = 0;
  for (; i + kWidth <= D; i += kWidth) {
    const VF v = load(x + i) - mean;
    squares = fma(v, v, squares);
  }
  float variance = sum_lanes(squares);
  for (; i < D; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(variance / static_cast<float>(D) + eps);
  for (i = 0; i < D; i += kWidth) {
    const int64_t m = lanes_left(i, D);
    const VF scaled = (load_floats(x, i, m) - mean) * scale * load_floats(weight, i, m);
    store_floats(out, i, m, bias ? scaled + load_floats(bias, i, m) : scaled);
  }
}

// With r = 1 / sqrt(var(x) + eps), n = (x - mean(x)) r and g = grad * weight: grad_x = r (g - mean(g) - n mean(g n)).
void layer_norm_backward_row(const float* x, const float* weight, const float* grad, float eps, int64_t D,
                             float* grad_x, float* grad_weight_sum, float* grad_bias_sum) {
  VF sums = {}, grads = {};
  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t m = lanes_left(i, D);
    sums += load_floats(x, i, m);
    grads = fma(load_floats(grad, i, m), load_floats(weight, i, m), grads);
  }
  const auto width = static_cast<float>(D);
  const float mean = sum_lanes(sums) / width, mean_grad = sum_lanes(grads) / width;
  VF squares = {}, products = {};  // of the centred values
  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t m = lanes_left(i, D);
    VF v = load_floats(x, i, m) - mean;
    for (int64_t lane = m; lane < kWidth; ++lane) v[lane] = 0.0f;
    squares = fma(v, v, squares);
    products = fma(load_floats(grad, i, m) * load_floats(weight, i, m), v, products);
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / width + eps);
  const float along_x = scale * scale * sum_lanes(products) / width;
  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t m = lanes_left(i, D);
    const VF v = load_floats(x, i, m) - mean, g = load_floats(grad, i, m);
    store_floats(grad_weight_sum, i, m, fma(g, v * scale, load_floats(grad_weight_sum, i, m)));
    store_floats(grad_bias_sum, i, m, load_floats(grad_bias_sum, i, m) + g);
    store_floats(grad_x, i, m, (fma(g, load_floats(weight, i, m), broadcast(-mean_grad)) - v * along_x) * scale);
  }
}

void softmax_row(const float* x, int64_t n, float* out) {
  float maximum = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(i, n);
    const VF e = exp(load_floats(x, i, m) - maximum);
    store_floats(out, i, m, e);
    for (int64_t lane = 0; lane < m; ++lane) sum += e[lane];
  }
  scale_row(out, DType::kF32, 1.0f / sum, out, DType::kF32, n);
}

void rope_head(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; i += kWidth) {
    const int64_t m = lanes_left(i, half);
    const VF a = load_floats(x, i, m), b = load_floats(x + half, i, m);
    const VF c = load_floats(cosine, i, m), s = load_floats(sine, i, m);
    store_floats(x, i, m, a * c - b * s);
    store_floats(x + half, i, m, b * c + a * s);
  }
}
