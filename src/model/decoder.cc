#include "model/decoder.h"

#include <algorithm>
#include <cmath>

#include "kernels/norm.h"
#include "kernels/rope.h"
#include "moe/dispatcher.h"
#include "moe/router.h"

namespace coterie {
namespace {

// In fp32 steps, as PyTorch computes it, so that far positions turn by the same angle.
std::vector<float> inverse_frequencies(const ModelConfig& config) {
  std::vector<float> result;
  for (int64_t i = 0; i < config.head_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(config.head_dim);
    result.push_back(1.0f / std::pow(static_cast<float>(config.rope_theta), exponent));
  }
  return result;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void clamp(float* x, int64_t n, float limit) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::clamp(x[i], -limit, limit);
}

int64_t most_experts(const ModelConfig& config) {
  int64_t most = 2;  // the residual mix uses the same buffer
  for (const LayerConfig& layer : config.layers) most = std::max(most, layer.router.num_experts);
  return most;
}

}  // namespace

void Batch::add(std::span<const int32_t> token_ids, int64_t first_position, std::span<const PagedKv> kv_L) {
  chunks.push_back({num_tokens(), static_cast<int64_t>(token_ids.size()), first_position, kv_L});
  token_ids_T.insert(token_ids_T.end(), token_ids.begin(), token_ids.end());
  for (size_t t = 0; t < token_ids.size(); ++t) positions_T.push_back(static_cast<int32_t>(first_position + t));
}

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, ThreadPool& pool)
    : config_(config), weights_(weights), pool_(pool), inverse_frequency_(inverse_frequencies(config)) {}

void Decoder::reserve(int64_t T) {
  const auto floats = [T](int64_t columns) { return T * columns * sizeof(float); };
  x_TD_.reserve(floats(config_.hidden_size));
  normed_TD_.reserve(floats(config_.hidden_size));
  q_THd_.reserve(floats(config_.num_heads * config_.head_dim));
  k_TGd_.reserve(floats(config_.num_kv_heads * config_.head_dim));
  v_TGd_.reserve(floats(config_.num_kv_heads * config_.head_dim));
  heads_THd_.reserve(floats(config_.num_heads * config_.head_dim));
  mlp_TD_.reserve(floats(config_.hidden_size));
  experts_TD_.reserve(floats(config_.hidden_size));
  router_TE_.reserve(floats(most_experts(config_)));
}

const float* Decoder::forward(const Batch& batch, RoutingTrace* trace) {
  const int64_t T = batch.num_tokens();
  reserve(T);
  embed(batch);
  size_t moe_layer = 0;
  for (int64_t n = 0; n < config_.num_layers(); ++n) {
    std::vector<int32_t>* expert_ids = nullptr;
    if (trace && config_.layers[n].is_moe()) {
      if (trace->size() == moe_layer) trace->emplace_back();
      expert_ids = &(*trace)[moe_layer++];
    }
    norm(weights_.layers[n].input_norm, T);
    attend(batch, n);
    norm(weights_.layers[n].post_attention_norm, T);
    feed_forward(n, T, expert_ids);
  }
  norm(weights_.norm, T);
  return normed_TD_.as<float>();
}

void Decoder::embed(const Batch& batch) {
  const int64_t D = config_.hidden_size;
  const size_t row_bytes = D * dtype_size(weights_.dtype);
  for (int64_t t = 0; t < batch.num_tokens(); ++t) {
    float* x_D = x_TD_.as<float>() + t * D;
    const char* row = weights_.embedding_VD.as<char>() + batch.token_ids_T[t] * row_bytes;
    convert_to_float(row, weights_.dtype, x_D, D);
    if (config_.positions != PositionKind::kLearned) continue;
    const float* position_D = weights_.positions_PD.data() + batch.positions_T[t] * D;
    for (int64_t i = 0; i < D; ++i) x_D[i] += position_D[i];
  }
}

// x += attention(normed x).
void Decoder::attend(const Batch& batch, int64_t layer) {
  const LayerWeights& w = weights_.layers[layer];
  const int64_t T = batch.num_tokens(), H = config_.num_heads, G = config_.num_kv_heads, d = config_.head_dim;
  project_queries_keys_values(w, T);
  if (config_.positions == PositionKind::kRope) {
    rope(q_THd_.as<float>(), H * d, batch.positions_T.data(), inverse_frequency_.data(), T, H, d, pool_);
    rope(k_TGd_.as<float>(), G * d, batch.positions_T.data(), inverse_frequency_.data(), T, G, d, pool_);
  }
  attend_chunks(batch, layer);
  gemm({.a = row_major(heads_THd_.as<const float>(), T, H * d),
        .packed_b = &w.attention_output.weight_NK,
        .c = row_major(x_TD_.as<float>(), T, config_.hidden_size),
        .bias_N = w.attention_output.bias(),
        .accumulate = true},
       pool_);
}

// heads = attention(q, cache and k, v) of all chunks at once.
void Decoder::attend_chunks(const Batch& batch, int64_t layer) {
  const int64_t H = config_.num_heads, G = config_.num_kv_heads, d = config_.head_dim;
  std::vector<AttentionChunk> chunks;
  for (const SequenceChunk& chunk : batch.chunks) {
    chunks.push_back({chunk.kv_L[layer], chunk.first_row, chunk.num_tokens, chunk.first_position + chunk.num_tokens});
  }
  append_kv(chunks, k_TGd_.as<float>(), v_TGd_.as<float>(), G * d, G, d, pool_);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  attention(chunks, q_THd_.as<float>(), H * d, H, G, d, scale, heads_THd_.as<float>(), pool_);
}

void Decoder::project_queries_keys_values(const LayerWeights& w, int64_t T) {
  const int64_t Hd = config_.num_heads * config_.head_dim, Gd = config_.num_kv_heads * config_.head_dim;
  float *q = q_THd_.as<float>(), *k = k_TGd_.as<float>(), *v = v_TGd_.as<float>();
  const auto product = [&](const LinearWeights& linear, float* out, int64_t columns) {
    return GemmProblem{.a = row_major(normed_TD_.as<const float>(), T, config_.hidden_size),
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

// x += MLP(normed x), or the mixture of experts.
void Decoder::feed_forward(int64_t layer, int64_t T, std::vector<int32_t>* expert_ids) {
  const LayerWeights& w = weights_.layers[layer];
  const LayerConfig& l = config_.layers[layer];
  const ConstMatrix normed_TD = row_major(normed_TD_.as<const float>(), T, config_.hidden_size);
  const Matrix mlp_TD = row_major(mlp_TD_.as<float>(), T, config_.hidden_size);
  const Matrix experts_TD = row_major(experts_TD_.as<float>(), T, config_.hidden_size);
  if (l.intermediate_size > 0) experts_forward(w.mlp, dense_dispatch(T), normed_TD, mlp_TD, pool_);
  if (!l.is_moe()) return add(mlp_TD_.as<float>(), T);

  float* logits_TE = router_TE_.as<float>();
  gemm({.a = normed_TD, .packed_b = &w.router_ED, .c = row_major(logits_TE, T, l.router.num_experts)}, pool_);
  RouterConfig dropless = l.router;
  dropless.eval_capacity_factor = 0;
  const RouteOptions options{.choice_bias_E = w.choice_bias_E.empty() ? nullptr : w.choice_bias_E.data()};
  const Routing routing = route(dropless, logits_TE, T, options, pool_);
  if (expert_ids) expert_ids->insert(expert_ids->end(), routing.expert_ids_TK.begin(), routing.expert_ids_TK.end());
  experts_forward(w.experts, make_dispatch(routing), normed_TD, experts_TD, pool_);
  add_mixture(w, l.residual, T);
}

void Decoder::add(const float* y_TD, int64_t T) {
  float* x_TD = x_TD_.as<float>();
  for (int64_t i = 0; i < T * config_.hidden_size; ++i) x_TD[i] += y_TD[i];
}

// x += the experts and the fixed MLP beside them, as ResidualKind says.
void Decoder::add_mixture(const LayerWeights& w, ResidualKind kind, int64_t T) {
  if (kind == ResidualKind::kNone) return add(experts_TD_.as<float>(), T);
  const int64_t D = config_.hidden_size, num_coefficients = w.mix.weight_NK.rows();
  float* mix_T = router_TE_.as<float>();  // the router is done with it
  if (num_coefficients > 0) {
    gemm({.a = row_major(normed_TD_.as<const float>(), T, D),
          .packed_b = &w.mix.weight_NK,
          .c = row_major(mix_T, T, num_coefficients),
          .bias_N = w.mix.bias()},
         pool_);
  }
  for (int64_t t = 0; t < T; ++t) {
    float experts = 1, mlp = 1;
    if (kind == ResidualKind::kLearned) {  // softmax of two is a sigmoid of their difference
      experts = sigmoid(mix_T[2 * t] - mix_T[2 * t + 1]);
      mlp = sigmoid(mix_T[2 * t + 1] - mix_T[2 * t]);
    } else if (kind == ResidualKind::kSharedGate) {
      mlp = sigmoid(mix_T[t]);
    }
    float* x_D = x_TD_.as<float>() + t * D;
    const float *y_D = experts_TD_.as<float>() + t * D, *m_D = mlp_TD_.as<float>() + t * D;
    for (int64_t i = 0; i < D; ++i) x_D[i] += experts * y_D[i] + mlp * m_D[i];
  }
}

void Decoder::norm(const NormWeights& w, int64_t T) {
  const float* x = x_TD_.as<float>();
  float* out = normed_TD_.as<float>();
  if (config_.norm == NormKind::kRmsNorm) {
    rms_norm(x, w.weight.data(), config_.norm_eps, T, config_.hidden_size, out, pool_);
  } else {
    layer_norm(x, w.weight.data(), w.bias.data(), config_.norm_eps, T, config_.hidden_size, out, pool_);
  }
}

void Decoder::logits(const float* hidden_TD, int64_t T, float* logits_TV) const {
  gemm({.a = row_major(hidden_TD, T, config_.hidden_size),
        .packed_b = &weights_.head_VD,
        .c = row_major(logits_TV, T, config_.vocab_size)},
       pool_);
}

}  // namespace coterie
