// Activation of rows and its gradient, for the training path.

void activate_row(const void* pre, DType dtype, int64_t F, Activation activation, bool gated, void* out) {
  for (int64_t i = 0; i < F; i += kWidth) {
    const int64_t n = lanes_left(i, F);
    VF v = activation_value(activation, load_any(pre, dtype, i, n));
    if (gated) v *= gated_factor(activation, load_any(pre, dtype, F + i, n));
    store_any(out, dtype, i, n, v);
  }
}

// inner = f(gate) * up gives d gate = f'(gate) * up * g and d up = f(gate) * g.
float activate_backward_row(const ActivationBackwardRow& row) {
  VF dot = {};
  for (int64_t i = 0; i < row.F; i += kWidth) {
    const int64_t n = lanes_left(i, row.F);
    const VF unweighted = load_any(row.grad_inner_F, row.dtype, i, n);
    dot = fma(unweighted, load_any(row.inner_F, row.dtype, i, n), dot);
    const VF grad = unweighted * row.weight;
    const VF pre = load_any(row.pre_U, row.dtype, i, n);
    VF grad_pre = grad * activation_derivative(row.activation, pre);
    if (row.gated) {
      const VF up = load_any(row.pre_U, row.dtype, row.F + i, n);
      store_any(row.grad_pre_U, row.dtype, row.F + i, n, grad * activation_value(row.activation, pre));
      grad_pre *= up;
    }
    store_any(row.grad_pre_U, row.dtype, i, n, grad_pre);
  }
  return sum_lanes(dot);
}
