// Feed-forward experts on grouped GEMMs: gather -> up (and gate) -> activation -> down -> weighted
// scatter-add. A dense MLP is the same thing with one expert. Legend: T tokens, D hidden, F expert
// inner size, E experts, R routed rows, U = 2F when gated, else F.
#pragma once

#include <cstdint>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/activation.h"
#include "kernels/gemm.h"
#include "moe/dispatcher.h"

namespace coterie {

struct ExpertShape {
  int64_t num_experts = 1;
  int64_t hidden_size = 0;        // D
  int64_t intermediate_size = 0;  // F
  Activation activation = Activation::kSilu;
  bool gated = true;  // up holds [gate; up] rows: inner = activation(gate x) * (up x)

  int64_t up_rows() const { return gated ? 2 * intermediate_size : intermediate_size; }  // U
};

// Weights as training and files hold them, or, for forward passes alone, in panels (then of `up` every expert has one
// matrix in up_E, packed as the shape's `gated` says, and up_EUD is not read; of `down` likewise). Biases may be null.
// All of one dtype, biases fp32.
struct ExpertWeights {
  const void* up_EUD = nullptr;
  const void* down_EDF = nullptr;
  const float* up_bias_EU = nullptr;
  const float* down_bias_ED = nullptr;
  DType dtype = DType::kF32;  // what is multiplied, and what is between the products
  const PackedMatrix* up_E = nullptr;
  const PackedMatrix* down_E = nullptr;
};

// Weights packed once for many forward passes.
struct PackedExperts {
  PackedExperts() = default;
  PackedExperts(const ExpertShape& shape, const ExpertWeights& weights, ThreadPool& pool);  // copies the biases

  ExpertWeights weights() const;

  ExpertShape shape;
  std::vector<PackedMatrix> up_E;
  std::vector<PackedMatrix> down_E;
  std::vector<float> up_bias_EU;
  std::vector<float> down_bias_ED;
};

// What the backward pass needs of the forward pass.
struct ExpertsContext {
  AlignedBuffer slopes_RU;  // of inner, see GemmProblem; of the weights' dtype, as is all between the products
  AlignedBuffer inner_RF;
};

// out_TD = sum over a token's rows of weight * expert(x). Overwrites out_TD (zeros where a token has
// no row). A token's rows are summed in the order of its choices, in fp32. x_TD, out_TD: kF32 or kBF16.
// With accumulate, the sum begins with what is in out_TD, which is fp32: a residual stream.
// `context`: null, or where what the backward pass needs is kept.
void experts_forward(const ExpertShape& shape, const ExpertWeights& weights, const Dispatch& dispatch,
                     const ConstMatrix& x_TD, const Matrix& out_TD, ExpertsContext* context, ThreadPool& pool,
                     bool accumulate = false);

inline void experts_forward(const PackedExperts& experts, const Dispatch& dispatch, const ConstMatrix& x_TD,
                            const Matrix& out_TD, ThreadPool& pool, bool accumulate = false) {
  experts_forward(experts.shape, experts.weights(), dispatch, x_TD, out_TD, nullptr, pool, accumulate);
}

// Gradients; a null pointer is not computed (frozen experts). Weight gradients have the dtype of the
// weights and are overwritten; experts without rows get zeros. grad_weight_R is the gradient of each
// row's routing weight.
struct ExpertGradients {
  void* grad_x_TD = nullptr;
  void* grad_up_EUD = nullptr;
  void* grad_down_EDF = nullptr;
  float* grad_up_bias_EU = nullptr;
  float* grad_down_bias_ED = nullptr;
  float* grad_weight_R = nullptr;
};
void experts_backward(const ExpertShape& shape, const ExpertWeights& weights, const Dispatch& dispatch,
                      const ConstMatrix& x_TD, const ConstMatrix& grad_out_TD, const ExpertsContext& context,
                      const ExpertGradients& gradients, ThreadPool& pool);

}  // namespace coterie
