// Multi-head latent attention (DeepSeek-V2, section 2.1) on a cache of latent vectors.
//
// A token's latent vector c (R numbers) and its turned key part k_r (r numbers, shared by all heads) are
//   [c'; k_r'] = W_kv_a x,  c = norm(c'),  k_r = turn(k_r').
// Head h has the key [U_h c; k_r] and the value V_h c, with U_h [n, R] and V_h [v, R] out of W_kv_b. Its query is
// [q_n; q_r], q_r turned. Since  q_n . (U_h c) = (U_h^T q_n) . c  and  sum_s p_s V_h c_s = V_h (sum_s p_s c_s),
// both matrices can be applied to queries and to outputs instead of to every token of the past:
//   score = [U_h^T q_n; q_r] . [c; k_r],   out_h = V_h (sum_s p_s c_s).
// So the cache holds [c; k_r], R + r numbers per token whatever the number of heads, and to the attention kernel this
// is one KV head whose values are the first R elements of its keys.
//
// Legend: T tokens, D hidden, H heads, n, r, v sizes of the parts of a head, d = n + r, R rank, C = R + r.
#pragma once

#include "base/memory.h"
#include "base/thread_pool.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/rotary.h"
#include "model/weights.h"

namespace coterie {

// Holds the buffers of one forward pass: one thread at a time.
class LatentAttentionLayer {
 public:
  LatentAttentionLayer(const ModelConfig& config, ThreadPool& pool);  // both must outlive it

  // The heads' outputs before the output projection, [T, H v], valid until the next call.
  const float* forward(const LayerWeights& w, int64_t layer, const Batch& batch, const Rotary& rotary,
                       const float* normed_TD);

 private:
  void reserve(int64_t T);
  void project(const LayerWeights& w, const float* normed_TD, int64_t T);
  void norm_rows(float* x, int64_t stride, const std::vector<float>& weight, int64_t T);
  void absorb_keys(const LatentWeights& w, int64_t T);
  void expand_values(const LatentWeights& w, int64_t T);

  const ModelConfig& config_;
  const LatentAttention& sizes_;
  ThreadPool& pool_;
  AlignedBuffer q_TQ_;          // the queries' bottleneck
  AlignedBuffer q_THd_;         // [q_n; q_r]
  AlignedBuffer absorbed_THC_;  // [U^T q_n; q_r]
  AlignedBuffer latent_TC_;     // [c; k_r]
  AlignedBuffer mixed_THR_;     // attention's mean of c
  AlignedBuffer heads_THv_;
};

}  // namespace coterie
