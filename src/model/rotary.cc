#include "model/rotary.h"

#include <algorithm>

namespace coterie {

Rotary::Rotary(const ModelConfig& config, ThreadPool& pool) : config_(config), pool_(pool) {}

void Rotary::set_length(int64_t length) {
  const RopeScaling& scaling = config_.rope_scaling;
  const int64_t wanted = scaling.turning_length(length);
  if (length_ == wanted) return;
  frequencies_ = rope_frequencies(scaling, config_.rope_theta, config_.num_rotary_dims(), wanted);
  factor_ = static_cast<float>(scaling.angle_factor(wanted));
  length_ = wanted;
}

void Rotary::prepare(const Batch& batch) {
  if (config_.positions != PositionKind::kRope) return;
  const int64_t half = config_.num_rotary_dims() / 2;
  num_tokens_ = batch.num_tokens();
  cosines_.resize(static_cast<size_t>(num_tokens_ * half));
  sines_.resize(cosines_.size());
  for (const SequenceChunk& chunk : batch.chunks) {
    for (int64_t t = chunk.first_row; t < chunk.first_row + chunk.num_tokens; ++t) {
      const int64_t position = batch.positions_T[t];
      set_length(std::max(chunk.start_length, position + 1));
      rope_angles(position, frequencies_.data(), half, factor_, cosines_.data() + t * half, sines_.data() + t * half);
    }
  }
}

void Rotary::rotate(float* x, int64_t token_stride, int64_t num_heads, int64_t head_stride) const {
  rope({.x = x,
        .T = num_tokens_,
        .token_stride = token_stride,
        .num_heads = num_heads,
        .head_stride = head_stride,
        .rotary_dim = config_.num_rotary_dims(),
        .interleaved = config_.rope_interleaved},
       cosines_.data(), sines_.data(), pool_);
}

}  // namespace coterie
