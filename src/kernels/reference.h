// The slow, obvious versions of everything in kernels/: plain loops, sums in double, no packing. They
// are the oracle of the tests, and what a reader should look at first. Same arguments, one thread.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/rope.h"

namespace coterie::reference {

double load(const ConstMatrix& m, int64_t row, int64_t col);
double activation_value(Activation activation, double x);
double gated_factor(Activation activation, double up);
double activation_derivative(Activation activation, double x);

// C of the problem as doubles [M * N], before rounding to C's type (accumulate reads C). Needs b, not
// packed_b. Operands are rounded to the type of B, as the contract in gemm.h says. When `sum_of_abs_MN`
// is given it receives sum_k |a b| of each element (gate and up added up when gated), which rounding
// errors are proportional to.
void gemm(const GemmProblem& problem, double* c_MN, double* sum_of_abs_MN = nullptr);

void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, double* out_TD);
void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                double* out_TD);
void rope(const RopeHeads& heads, const int32_t* positions_T, const float* inverse_frequency);
void attention(const float* q_THd, const PagedKv& kv, int64_t T, int64_t S, const AttentionShape& shape,
               double* out_THv);

}  // namespace coterie::reference
