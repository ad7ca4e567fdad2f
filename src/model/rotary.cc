#include "model/rotary.h"

#include <algorithm>

namespace coterie {

Rotary::Rotary(const ModelConfig& config, ThreadPool& pool) : config_(config), pool_(pool) {}

const std::vector<float>& Rotary::frequencies(int64_t length) {
  const RopeScaling& scaling = config_.rope_scaling;
  const bool by_length = scaling.kind == RopeScalingKind::kDynamic;
  const int64_t wanted = by_length ? std::max(length, scaling.original_context) : 1;
  if (length_ != wanted) {
    frequencies_ = rope_frequencies(scaling, config_.rope_theta, config_.num_rotary_dims(), wanted);
    length_ = wanted;
  }
  return frequencies_;
}

void Rotary::prepare(const Batch& batch) {
  if (config_.positions != PositionKind::kRope) return;
  const int64_t half = config_.num_rotary_dims() / 2;
  const auto factor = static_cast<float>(config_.rope_scaling.angle_factor());
  num_tokens_ = batch.num_tokens();
  cosines_.resize(static_cast<size_t>(num_tokens_ * half));
  sines_.resize(cosines_.size());
  for (const SequenceChunk& chunk : batch.chunks) {
    for (int64_t t = chunk.first_row; t < chunk.first_row + chunk.num_tokens; ++t) {
      const int64_t position = batch.positions_T[t];
      const float* const frequency = frequencies(std::max(chunk.prompt_length, position + 1)).data();
      rope_angles(position, frequency, half, factor, cosines_.data() + t * half, sines_.data() + t * half);
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
