// The gradient of the activation of a row, for the training path.

float activate_backward_row(const ActivationBackwardRow& row) {
  VF dot = {};
  for (int64_t i = 0; i < row.F; i += kWidth) {
    const int64_t n = lanes_left(i, row.F);
    const VF unweighted = load_any(row.grad_inner_F, row.dtype, i, n);
    dot = fma(unweighted, load_any(row.inner_F, row.dtype, i, n), dot);
    const VF grad = unweighted * row.weight;
    store_any(row.grad_pre_U, row.dtype, i, n, grad * load_any(row.slopes_U, row.dtype, i, n));
    if (!row.gated) continue;
    store_any(row.grad_pre_U, row.dtype, row.F + i, n, grad * load_any(row.slopes_U, row.dtype, row.F + i, n));
  }
  return sum_lanes(dot);
}
