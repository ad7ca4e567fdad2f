// RMSNorm and LayerNorm over the last dimension. Legend: T rows (tokens or heads), D width.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"

namespace coterie {

// out = x / sqrt(mean(x^2) + eps) * weight. x_TD and out_TD may be the same memory.
void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, float* out_TD,
              ThreadPool& pool);

// Gradients of rms_norm, overwritten. grad_weight_D is summed over rows in an order that depends on T
// and D alone. grad_x_TD may be the memory of grad_TD.
void rms_norm_backward(const float* x_TD, const float* weight_D, const float* grad_TD, float eps, int64_t T, int64_t D,
                       float* grad_x_TD, float* grad_weight_D, ThreadPool& pool);

// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (bias may be null). In place is fine.
void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                float* out_TD, ThreadPool& pool);

}  // namespace coterie
