// Rows of scores to rows of weights and back, for causal_attention.

// out = exp(scale * (x - max x)); returns the sum and the maximum.
SoftmaxSum exponentials_row(const float* x, int64_t n, float scale, void* out, DType dtype) {
  VF maxima = broadcast(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) maxima = max(maxima, load(x + i));
  float maximum = max_lanes(maxima);
  for (; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  VF sums = {};
  for (i = 0; i + kWidth <= n; i += kWidth) {
    const VF e = exp_up_to_zero((load(x + i) - maximum) * scale);
    store_any(out, dtype, i, kWidth, e);
    sums += e;
  }
  float sum = sum_lanes(sums);
  if (i < n) {
    const VF e = exp_up_to_zero((load_part(x + i, n - i) - maximum) * scale);
    store_any(out, dtype, i, n - i, e);
    for (int64_t lane = 0; lane < n - i; ++lane) sum += e[lane];
  }
  return {sum, maximum};
}

void attention_backward_row(const AttentionBackwardRow& row) {
  VF products = {};
  for (int64_t i = 0; i < row.n; i += kWidth) {
    const int64_t m = lanes_left(i, row.n);
    const VF weight = exp_up_to_zero(load_floats(row.scores, i, m) * row.scale - row.logsumexp);
    store_any(row.weights, row.dtype, i, m, weight);
    store_floats(row.scores, i, m, weight);
    // Read back, lanes past the row are zero, and not what exp gave for them.
    products = fma(load_floats(row.scores, i, m), load_floats(row.grad_weights, i, m), products);
  }
  const float delta = sum_lanes(products);
  for (int64_t i = 0; i < row.n; i += kWidth) {
    const int64_t m = lanes_left(i, row.n);
    const VF gradient = (load_floats(row.grad_weights, i, m) - delta) * row.scale;
    store_any(row.grad_scores, row.dtype, i, m, load_floats(row.scores, i, m) * gradient);
  }
}
