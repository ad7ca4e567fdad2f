// What a step of a model costs by how many tokens it has.
//
// A step reads the weights that its tokens need. Those of attention, the head and everything dense are needed by any
// token. Of the E experts of a MoE layer, t tokens that choose K each need E (1 - (1 - K/E)^t), when they choose
// evenly and for themselves. So a token more is nearly free for a dense model, and for a MoE in a batch that needs
// most experts anyway; a MoE at batch 1 pays for nearly all of its experts again.
//   bytes(t) = dense + sum over MoE layers of bytes per expert * E (1 - (1 - K/E)^t)
//   seconds(t) = bytes(t) * seconds per byte + t * seconds per token
// The KV cache is left out: a step reads it once for all tokens of a sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kv_cache.h"
#include "model/config.h"
#include "model/decoder.h"
#include "model/weight_types.h"
#include "model/weights.h"

namespace coterie {

// The types that a step reads: experts that a file has in MXFP4 stay in it whatever is wanted.
WeightTypes types_in_memory(const WeightTypes& wanted, const ModelWeights& weights);

class StepCost {
 public:
  // Until fit(), seconds are bytes.
  StepCost(const ModelConfig& config, const WeightTypes& types);

  double bytes(int64_t num_tokens) const;
  double seconds(int64_t num_tokens) const;

  // Takes the factors from what steps of 1 and of n > 1 tokens took.
  void fit(double seconds_of_1, int64_t n, double seconds_of_n);

 private:
  struct Experts {  // of all layers with the same E and K
    int64_t num_experts = 0, top_k = 0;
    double bytes_each = 0;
  };

  double dense_bytes_ = 0;
  std::vector<Experts> experts_;
  double seconds_per_byte_ = 1, seconds_per_token_ = 0;
};

// Runs steps of 1 and of a few tokens, head included. The cache needs a free block.
StepCost measure_step_cost(const ModelConfig& config, const WeightTypes& types, Decoder& decoder, KvCache& cache);

}  // namespace coterie
