// Attention with keys and values of its own, multi-head or grouped-query.
// Legend: T tokens, D hidden, H query heads, G KV heads, d head_dim.
#pragma once

#include "base/memory.h"
#include "base/thread_pool.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/rotary.h"
#include "model/weights.h"

namespace coterie {

// Holds the buffers of one forward pass: one thread at a time.
class SelfAttention {
 public:
  SelfAttention(const ModelConfig& config, ThreadPool& pool);  // both must outlive it

  // The heads' outputs before the output projection, [T, H d], valid until the next call.
  const float* forward(const LayerWeights& w, int64_t layer, const Batch& batch, const Rotary& rotary,
                       const float* normed_TD);

 private:
  void reserve(int64_t T);
  const uint32_t* quantized_input(const LayerWeights& w, const ConstMatrix& input_TD);
  void project(const LayerWeights& w, const float* normed_TD, int64_t T);

  const ModelConfig& config_;
  ThreadPool& pool_;
  AlignedBuffer quantized_TD_, q_THd_, k_TGd_, v_TGd_, heads_THd_;
};

}  // namespace coterie
