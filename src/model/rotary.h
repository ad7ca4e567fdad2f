// The rotary positions of a batch: angles are computed once and serve all layers.
#pragma once

#include <vector>

#include "base/thread_pool.h"
#include "kernels/rope.h"
#include "model/batch.h"
#include "model/config.h"

namespace coterie {

// One thread at a time.
class Rotary {
 public:
  Rotary(const ModelConfig& config, ThreadPool& pool);  // both must outlive it

  // The angles of the batch's tokens. Nothing where the model has no rotary positions.
  //
  // Where the length of a sequence matters, a token turns as one of length max(start_length, its position + 1) has it,
  // which is what transformers gives a prompt that runs at once and is continued from its cache. Under
  // RopeScalingKind::kDynamic keys keep the base under which they entered the cache, so keys of a prefix serve no other
  // prompt beyond the original context. Under kLongrope whoever outgrows the original context is computed anew
  // (engine/sequence.h), as the generate() of transformers does with Phi's models.
  void prepare(const Batch& batch);

  // Turns every head of every token of the batch; x begins at the first element to be turned.
  void rotate(float* x, int64_t token_stride, int64_t num_heads, int64_t head_stride) const;

 private:
  void set_length(int64_t length);

  const ModelConfig& config_;
  ThreadPool& pool_;
  int64_t length_ = 0;
  std::vector<float> frequencies_;  // [rotary_dim / 2] of length_
  float factor_ = 1.0f;             // likewise
  int64_t num_tokens_ = 0;
  std::vector<float> cosines_, sines_;  // [T, rotary_dim / 2]
};

}  // namespace coterie
