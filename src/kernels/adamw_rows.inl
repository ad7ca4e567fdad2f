// The optimizer's pass over a stretch of a parameter.

float square_sum_row(const void* x, DType dtype, int64_t n) {
  VF sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const VF v = load_any(x, dtype, i + j * kWidth, kWidth);
      sums[j] = fma(v, v, sums[j]);
    }
  }
  for (; i < n; i += kWidth) {
    const VF v = load_any(x, dtype, i, lanes_left(i, n));
    sums[0] = fma(v, v, sums[0]);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <DType kGradType>
void adamw_row_of(const AdamWRow& row) {
  const AdamWFactors& f = row.factors;
  for (int64_t i = 0; i < row.n; i += kWidth) {
    const int64_t m = lanes_left(i, row.n);
    const VF old = load_floats(row.master, i, m);
    const VF raw = row.grad ? load_any(row.grad, kGradType, i, m) * f.grad_scale : VF{};
    const VF grad = fma(old, broadcast(f.l2), raw);
    const VF average = fma(load_floats(row.exp_avg, i, m) - grad, broadcast(f.beta1), grad);
    const VF square = grad * grad;
    const VF average_square = fma(load_floats(row.exp_avg_sq, i, m) - square, broadcast(f.beta2), square);
    const VF step = f.step_size * average / fma(root(average_square), broadcast(f.inverse_root), broadcast(f.eps));
    const VF master = fma(old, broadcast(f.decay), -step);
    store_floats(row.exp_avg, i, m, average);
    store_floats(row.exp_avg_sq, i, m, average_square);
    store_floats(row.master, i, m, master);
    if (row.parameter) store_any(row.parameter, DType::kBF16, i, m, master);
  }
}

void adamw_row(const AdamWRow& row) {
  row.grad_dtype == DType::kBF16 ? adamw_row_of<DType::kBF16>(row) : adamw_row_of<DType::kF32>(row);
}

// The random bits are Murmur3's last mix (Appleby 2011) of the index and the key.
void round_randomly_row(const float* in, uint32_t key, BFloat16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t mixed = static_cast<uint32_t>(i) * 0x9E3779B9u + key;
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6Bu;
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35u;
    const uint32_t below = (mixed ^ (mixed >> 16)) & 0xFFFFu;
    out[i].bits = static_cast<uint16_t>((std::bit_cast<uint32_t>(in[i]) + below) >> 16);
  }
}
