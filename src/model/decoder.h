// The forward pass of a decoder-only transformer over a batch of new tokens.
// Activations and the residual stream are fp32; weights and the KV cache may be bf16.
// Legend: T tokens of the batch, D hidden, V vocabulary, L layers, H query heads, G KV heads,
// d head_dim, K experts per token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/attention.h"
#include "model/config.h"
#include "model/weights.h"

namespace coterie {

// The new tokens of one sequence within a batch: rows [first_row, first_row + num_tokens).
struct SequenceChunk {
  int64_t first_row = 0;
  int64_t num_tokens = 0;
  int64_t first_position = 0;     // of the first of them; so many tokens lie in the KV cache already
  std::span<const PagedKv> kv_L;  // with room for the new tokens
};

struct Batch {
  std::vector<int32_t> token_ids_T;
  std::vector<int32_t> positions_T;
  std::vector<SequenceChunk> chunks;

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids_T.size()); }
  void add(std::span<const int32_t> token_ids, int64_t first_position, std::span<const PagedKv> kv_L);
};

// Which experts the tokens went to: one list of [T * K] per MoE layer, appended to by every forward.
using RoutingTrace = std::vector<std::vector<int32_t>>;

// Holds the buffers of one forward pass, so one thread at a time may use a Decoder.
class Decoder {
 public:
  Decoder(const ModelConfig& config, const ModelWeights& weights, ThreadPool& pool);  // all must outlive it

  // The final hidden states [T, D], normalised, valid until the next call. Token ids and positions must be
  // in range. Routing is dropless: a capacity is a matter of training.
  const float* forward(const Batch& batch, RoutingTrace* trace = nullptr);

  // logits_TV = hidden_TD * head^T.
  void logits(const float* hidden_TD, int64_t T, float* logits_TV) const;

 private:
  void reserve(int64_t T);
  void embed(const Batch& batch);
  void attend(const Batch& batch, int64_t layer);
  void attend_chunks(const Batch& batch, int64_t layer);
  void feed_forward(int64_t layer, int64_t T, std::vector<int32_t>* expert_ids);
  void project_queries_keys_values(const LayerWeights& w, int64_t T);
  void norm(const NormWeights& w, int64_t T);
  void add(const float* y_TD, int64_t T);
  void add_mixture(const LayerWeights& w, ResidualKind kind, int64_t T);

  const ModelConfig& config_;
  const ModelWeights& weights_;
  ThreadPool& pool_;
  std::vector<float> inverse_frequency_;  // [d / 2]

  AlignedBuffer x_TD_;  // the residual stream
  AlignedBuffer normed_TD_;
  AlignedBuffer q_THd_, k_TGd_, v_TGd_;
  AlignedBuffer heads_THd_;  // attention's output
  AlignedBuffer mlp_TD_;     // dense or fixed MLP
  AlignedBuffer experts_TD_;
  AlignedBuffer router_TE_;
};

}  // namespace coterie
