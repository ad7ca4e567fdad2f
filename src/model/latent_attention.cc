#include "model/latent_attention.h"

#include <algorithm>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "model/cached_attention.h"

namespace coterie {
namespace {

// `cols` columns of a matrix of T rows, from column `first` on.
Matrix columns(float* data, int64_t T, int64_t stride, int64_t first, int64_t cols) {
  return {data + first, DType::kF32, T, cols, stride};
}

}  // namespace

LatentAttentionLayer::LatentAttentionLayer(const ModelConfig& config, ThreadPool& pool)
    : config_(config), sizes_(config.latent), pool_(pool) {}

void LatentAttentionLayer::reserve(int64_t T) {
  const size_t row = T * sizeof(float), heads = row * config_.num_heads;
  const int64_t C = sizes_.kv_rank + sizes_.rope_dim;
  q_TQ_.reserve(row * sizes_.q_rank);
  q_THd_.reserve(heads * config_.head_dim);
  absorbed_THC_.reserve(heads * C);
  latent_TC_.reserve(row * C);
  mixed_THR_.reserve(heads * sizes_.kv_rank);
  heads_THv_.reserve(heads * sizes_.v_dim);
}

const float* LatentAttentionLayer::forward(const LayerWeights& w, int64_t layer, const Batch& batch,
                                           const Rotary& rotary, const float* normed_TD) {
  const int64_t T = batch.num_tokens(), H = config_.num_heads, d = config_.head_dim;
  const int64_t R = sizes_.kv_rank, C = R + sizes_.rope_dim;
  reserve(T);
  project(w, normed_TD, T);
  norm_rows(latent_TC_.as<float>(), C, w.latent.kv_a_norm, T);
  rotary.rotate(q_THd_.as<float>() + sizes_.nope_dim, H * d, H, d);
  rotary.rotate(latent_TC_.as<float>() + R, C, 1, C);
  absorb_keys(w.latent, T);
  const AttentionShape shape = {
      .H = H, .G = 1, .d = C, .v = R, .scale = config_.score_scale(), .window = config_.layers[layer].window};
  attend_to_cache(batch, layer, absorbed_THC_.as<float>(), latent_TC_.as<float>(), nullptr, shape,
                  mixed_THR_.as<float>(), pool_);
  expand_values(w.latent, T);
  return heads_THv_.as<float>();
}

// q_THd and the raw latent_TC.
void LatentAttentionLayer::project(const LayerWeights& w, const float* normed_TD, int64_t T) {
  const int64_t Hd = config_.num_heads * config_.head_dim, Q = sizes_.q_rank, C = sizes_.kv_rank + sizes_.rope_dim;
  const auto product = [&](const LinearWeights& linear, const float* x, int64_t in, AlignedBuffer& out, int64_t cols) {
    return GemmProblem{.a = row_major(x, T, in),
                       .packed_b = &linear.weight_NK,
                       .c = row_major(out.as<float>(), T, cols),
                       .bias_N = linear.bias()};
  };
  const int64_t D = config_.hidden_size;
  const GemmProblem first[] = {
      Q > 0 ? product(w.latent.q_a, normed_TD, D, q_TQ_, Q) : product(w.q, normed_TD, D, q_THd_, Hd),
      product(w.latent.kv_a, normed_TD, D, latent_TC_, C)};
  grouped_gemm(first, pool_);
  if (Q == 0) return;
  norm_rows(q_TQ_.as<float>(), Q, w.latent.q_a_norm, T);
  gemm(product(w.latent.q_b, q_TQ_.as<float>(), Q, q_THd_, Hd), pool_);
}

// RMSNorm in place of the first weight.size() elements of rows that are `stride` apart.
void LatentAttentionLayer::norm_rows(float* x, int64_t stride, const std::vector<float>& weight, int64_t T) {
  const auto width = static_cast<int64_t>(weight.size());
  parallel_rows(T, width, pool_, [&](int64_t t) {
    float* const row = x + t * stride;
    active_kernels().rms_norm_row(row, weight.data(), sizes_.norm_eps, width, row);
  });
}

void LatentAttentionLayer::absorb_keys(const LatentWeights& w, int64_t T) {
  const int64_t H = config_.num_heads, d = config_.head_dim, R = sizes_.kv_rank, C = R + sizes_.rope_dim;
  std::vector<GemmProblem> heads;
  for (int64_t h = 0; h < H; ++h) {
    heads.push_back({.a = columns(q_THd_.as<float>(), T, H * d, h * d, sizes_.nope_dim),
                     .packed_b = &w.key_up_H[h],
                     .c = columns(absorbed_THC_.as<float>(), T, H * C, h * C, R)});
  }
  grouped_gemm(heads, pool_);
  parallel_rows(T * H, sizes_.rope_dim, pool_, [&](int64_t i) {
    const float* turned = q_THd_.as<float>() + i * d + sizes_.nope_dim;
    std::copy(turned, turned + sizes_.rope_dim, absorbed_THC_.as<float>() + i * C + R);
  });
}

void LatentAttentionLayer::expand_values(const LatentWeights& w, int64_t T) {
  const int64_t H = config_.num_heads, R = sizes_.kv_rank, v = sizes_.v_dim;
  std::vector<GemmProblem> heads;
  for (int64_t h = 0; h < H; ++h) {
    heads.push_back({.a = columns(mixed_THR_.as<float>(), T, H * R, h * R, R),
                     .packed_b = &w.value_up_H[h],
                     .c = columns(heads_THv_.as<float>(), T, H * v, h * v, v)});
  }
  grouped_gemm(heads, pool_);
}

}  // namespace coterie
