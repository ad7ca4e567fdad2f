// The forward pass of a decoder-only transformer over a batch of new tokens.
// Activations and the residual stream are fp32; weights and the KV cache may be bf16.
// Legend: T tokens of the batch, D hidden, V vocabulary, E experts, K experts per token.
#pragma once

#include <cstdint>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/expert_cache.h"
#include "model/latent_attention.h"
#include "model/rotary.h"
#include "model/self_attention.h"
#include "model/weights.h"

namespace coterie {

// Which experts the tokens went to: one list of [T * K] per MoE layer, appended to by every forward.
using RoutingTrace = std::vector<std::vector<int32_t>>;

// Holds the buffers of one forward pass, so one thread at a time may use a Decoder.
class Decoder {
 public:
  // All must outlive it. expert_cache: of the weights, or null.
  Decoder(const ModelConfig& config, const ModelWeights& weights, ThreadPool& pool,
          ExpertCache* expert_cache = nullptr);

  // The final hidden states [T, D], normalised, valid until the next call. Token ids and positions must be
  // in range. Routing is dropless: a capacity is a matter of training.
  const float* forward(const Batch& batch, RoutingTrace* trace = nullptr);

  // logits_TV = (hidden_TD * head^T + bias) / logits_scaling.
  void logits(const float* hidden_TD, int64_t T, float* logits_TV) const;

 private:
  void reserve(int64_t T);
  void embed(const Batch& batch);
  void attend(const Batch& batch, int64_t layer);
  void feed_forward(int64_t layer, int64_t T, std::vector<int32_t>* expert_ids);
  void norm(const NormWeights& w, int64_t T);
  // To tokens [first, first + T); the dispatch is of as many.
  void add(const float* y_TD, int64_t T, int64_t first);
  void add_experts(const PackedExperts& experts, const Dispatch& dispatch, int64_t first);
  void add_mixture(const LayerWeights& w, ResidualKind kind, const Dispatch& dispatch, int64_t first);

  const ModelConfig& config_;
  const ModelWeights& weights_;
  ThreadPool& pool_;
  ExpertCache* expert_cache_;
  Rotary rotary_;
  SelfAttention self_attention_;
  LatentAttentionLayer latent_attention_;

  AlignedBuffer x_TD_;  // the residual stream
  AlignedBuffer normed_TD_;
  AlignedBuffer mlp_TD_;  // dense or fixed MLP
  AlignedBuffer experts_TD_;
  AlignedBuffer router_TE_;
};

}  // namespace coterie
