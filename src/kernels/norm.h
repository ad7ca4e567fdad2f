// RMSNorm and LayerNorm over the last dimension. Legend: T rows (tokens or heads), D width.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"

namespace coterie {

// out = x / sqrt(mean(x^2) + eps) * weight. x_TD and out_TD may be the same memory.
void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, float* out_TD,
              ThreadPool& pool);

// What the backward passes read and overwrite. grad_weight_D and grad_bias_D are summed over rows in an order that
// depends on T and D alone. grad_x_TD may be the memory of grad_TD.
struct NormBackward {
  const float* x_TD = nullptr;
  const float* weight_D = nullptr;
  const float* grad_TD = nullptr;      // of the result
  const float* residual_TD = nullptr;  // what else x's gradient consists of; null: nothing
  float eps = 0.0f;
  int64_t T = 0, D = 0;
  float* grad_x_TD = nullptr;
  float* grad_weight_D = nullptr;
  float* grad_bias_D = nullptr;  // null: not wanted; of layer_norm alone
};
void rms_norm_backward(const NormBackward& backward, ThreadPool& pool);
void layer_norm_backward(const NormBackward& backward, ThreadPool& pool);

// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (bias may be null). In place is fine.
void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                float* out_TD, ThreadPool& pool);

}  // namespace coterie
