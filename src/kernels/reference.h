// The slow, obvious versions of everything in kernels/: plain loops, sums in double, no packing. They
// are the oracle of the tests, and what a reader should look at first. Same arguments, one thread.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/gemm.h"

namespace coterie::reference {

double load(const ConstMatrix& m, int64_t row, int64_t col);
double activation_value(Activation activation, double x);
double activation_derivative(Activation activation, double x);

// C of the problem as doubles [M * N], before rounding to C's type (accumulate reads C). Needs b, not
// packed_b. Operands are rounded to the type of B, as the contract in gemm.h says. When `sum_of_abs_MN`
// is given it receives sum_k |a b| of each element (gate and up added up when gated), which rounding
// errors are proportional to.
void gemm(const GemmProblem& problem, double* c_MN, double* sum_of_abs_MN = nullptr);

void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, double* out_TD);
void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                double* out_TD);
void rope(float* x, int64_t token_stride, const int32_t* positions_T, const float* inverse_frequency, int64_t T,
          int64_t num_heads, int64_t head_dim);
void attention(const float* q, int64_t token_stride, const PagedKv& kv, int64_t T, int64_t S, int64_t H, int64_t G,
               int64_t d, float scale, double* out_THd);

}  // namespace coterie::reference
