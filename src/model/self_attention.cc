#include "model/self_attention.h"

#include <algorithm>

#include "kernels/norm.h"
#include "model/cached_attention.h"

namespace coterie {
namespace {

void clamp(float* x, int64_t n, float limit) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::clamp(x[i], -limit, limit);
}

}  // namespace

SelfAttention::SelfAttention(const ModelConfig& config, ThreadPool& pool) : config_(config), pool_(pool) {}

void SelfAttention::reserve(int64_t T) {
  const size_t head = T * config_.head_dim * sizeof(float);
  q_THd_.reserve(config_.num_heads * head);
  k_TGd_.reserve(config_.num_kv_heads * head);
  v_TGd_.reserve(config_.num_kv_heads * head);
  heads_THd_.reserve(config_.num_heads * head);
}

const float* SelfAttention::forward(const LayerWeights& w, int64_t layer, const Batch& batch, const Rotary& rotary,
                                    const float* normed_TD) {
  const int64_t T = batch.num_tokens(), H = config_.num_heads, G = config_.num_kv_heads, d = config_.head_dim;
  reserve(T);
  project(w, normed_TD, T);
  if (config_.positions == PositionKind::kRope) {
    rotary.rotate(q_THd_.as<float>(), H * d, H, d);
    rotary.rotate(k_TGd_.as<float>(), G * d, G, d);
  }
  const AttentionShape shape = {.H = H,
                                .G = G,
                                .d = d,
                                .v = d,
                                .scale = config_.score_scale(),
                                .window = config_.layers[layer].window,
                                .sinks_H = w.sinks_H.empty() ? nullptr : w.sinks_H.data()};
  attend_to_cache(batch, layer, q_THd_.as<float>(), k_TGd_.as<float>(), v_TGd_.as<float>(), shape,
                  heads_THd_.as<float>(), pool_);
  return heads_THd_.as<float>();
}

// What queries, keys and values are all made of is quantized once for them.
const uint32_t* SelfAttention::quantized_input(const LayerWeights& w, const ConstMatrix& input_TD) {
  const PanelType type = w.q.weight_NK.type();
  const bool alike = w.k.weight_NK.type() == type && w.v.weight_NK.type() == type;
  if (!is_quantized(type) || !alike) return nullptr;
  quantized_TD_.reserve(static_cast<size_t>(input_TD.rows * a_row_units(type, input_TD.cols)) * sizeof(uint32_t));
  quantize_rows(input_TD, type, quantized_TD_.as<uint32_t>(), pool_);
  return quantized_TD_.as<uint32_t>();
}

void SelfAttention::project(const LayerWeights& w, const float* normed_TD, int64_t T) {
  const int64_t Hd = config_.num_heads * config_.head_dim, Gd = config_.num_kv_heads * config_.head_dim;
  float *q = q_THd_.as<float>(), *k = k_TGd_.as<float>(), *v = v_TGd_.as<float>();
  const ConstMatrix input_TD = row_major(normed_TD, T, config_.hidden_size);
  const uint32_t* const quantized_TD = quantized_input(w, input_TD);
  const auto product = [&](const LinearWeights& linear, float* out, int64_t columns) {
    return GemmProblem{.a = input_TD,
                       .quantized_a = quantized_TD,
                       .packed_b = &linear.weight_NK,
                       .c = row_major(out, T, columns),
                       .bias_N = linear.bias()};
  };
  const GemmProblem products[] = {product(w.q, q, Hd), product(w.k, k, Gd), product(w.v, v, Gd)};
  grouped_gemm(products, pool_);

  if (config_.qk_norm != QkNorm::kNone) {
    const int64_t q_width = config_.qk_norm == QkNorm::kFull ? Hd : config_.head_dim;
    const int64_t k_width = config_.qk_norm == QkNorm::kFull ? Gd : config_.head_dim;
    rms_norm(q, w.q_norm.data(), config_.norm_eps, T * Hd / q_width, q_width, q, pool_);
    rms_norm(k, w.k_norm.data(), config_.norm_eps, T * Gd / k_width, k_width, k, pool_);
  }
  if (config_.clip_qkv > 0) {  // after the norm, as OLMoE has it
    clamp(q, T * Hd, config_.clip_qkv);
    clamp(k, T * Gd, config_.clip_qkv);
    clamp(v, T * Gd, config_.clip_qkv);
  }
}

}  // namespace coterie
