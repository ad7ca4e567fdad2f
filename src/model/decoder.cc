#include "model/decoder.h"

#include <algorithm>
#include <cmath>

#include "kernels/norm.h"
#include "kernels/parallel_rows.h"
#include "moe/dispatcher.h"
#include "moe/router.h"

namespace coterie {
namespace {

void scale(float factor, float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

int64_t most_experts(const ModelConfig& config) {
  int64_t most = 2;  // the residual mix uses the same buffer
  for (const LayerConfig& layer : config.layers) most = std::max(most, layer.router.num_experts);
  return most;
}

// Experts hold their results until they are summed up, a row for each choice. Tokens of long prompts take turns at
// them, so many that an expert has rows enough to make its weights worth reading.
int64_t most_tokens_at_once(const RouterConfig& router) {
  constexpr int64_t kRowsOfExpert = 128;
  return std::max<int64_t>(1, kRowsOfExpert * router.num_experts / router.top_k);
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, ThreadPool& pool, ExpertCache* expert_cache)
    : config_(config),
      weights_(weights),
      pool_(pool),
      expert_cache_(expert_cache),
      rotary_(config, pool),
      self_attention_(config, pool),
      latent_attention_(config, pool) {}

void Decoder::reserve(int64_t T) {
  const auto floats = [T](int64_t columns) { return T * columns * sizeof(float); };
  x_TD_.reserve(floats(config_.hidden_size));
  normed_TD_.reserve(floats(config_.hidden_size));
  mlp_TD_.reserve(floats(config_.hidden_size));
  experts_TD_.reserve(floats(config_.hidden_size));
  router_TE_.reserve(floats(most_experts(config_)));
}

const float* Decoder::forward(const Batch& batch, RoutingTrace* trace) {
  const int64_t T = batch.num_tokens();
  reserve(T);
  embed(batch);
  rotary_.prepare(batch);
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
  const PackedMatrix& embedding_VD = weights_.embedding();
  parallel_rows(batch.num_tokens(), D, pool_, [&](int64_t t) {
    float* x_D = x_TD_.as<float>() + t * D;
    embedding_VD.read_row(batch.token_ids_T[t], x_D);
    if (config_.embedding_multiplier != 1) scale(config_.embedding_multiplier, x_D, D);
    if (config_.positions != PositionKind::kLearned) return;
    const float* position_D = weights_.positions_PD.data() + batch.positions_T[t] * D;
    for (int64_t i = 0; i < D; ++i) x_D[i] += position_D[i];
  });
}

// x += attention(normed x).
void Decoder::attend(const Batch& batch, int64_t layer) {
  const LayerWeights& w = weights_.layers[layer];
  const int64_t T = batch.num_tokens(), D = config_.hidden_size;
  const float* normed_TD = normed_TD_.as<float>();
  const float* heads = config_.is_latent() ? latent_attention_.forward(w, layer, batch, rotary_, normed_TD)
                                           : self_attention_.forward(w, layer, batch, rotary_, normed_TD);
  const bool direct = config_.residual_multiplier == 1;
  float* out_TD = direct ? x_TD_.as<float>() : mlp_TD_.as<float>();
  gemm({.a = row_major(heads, T, config_.attention_width()),
        .packed_b = &w.attention_output.weight_NK,
        .c = row_major(out_TD, T, D),
        .bias_N = w.attention_output.bias(),
        .accumulate = direct},
       pool_);
  if (!direct) add(out_TD, T, 0);
}

// x += MLP(normed x), or the mixture of experts.
void Decoder::feed_forward(int64_t layer, int64_t T, std::vector<int32_t>* expert_ids) {
  const LayerWeights& w = weights_.layers[layer];
  const LayerConfig& l = config_.layers[layer];
  if (!l.is_moe()) return add_experts(w.mlp, dense_dispatch(T), 0);

  float* logits_TE = router_TE_.as<float>();
  gemm({.a = row_major(normed_TD_.as<const float>(), T, config_.hidden_size),
        .packed_b = &w.router.weight_NK,
        .c = row_major(logits_TE, T, l.router.num_experts),
        .bias_N = w.router.bias()},
       pool_);
  RouterConfig dropless = l.router;
  dropless.eval_capacity_factor = 0;
  const RouteOptions options{.choice_bias_E = w.choice_bias_E.empty() ? nullptr : w.choice_bias_E.data()};
  const Routing routing = route(dropless, logits_TE, T, options, pool_);
  if (expert_ids) expert_ids->insert(expert_ids->end(), routing.expert_ids_TK.begin(), routing.expert_ids_TK.end());
  const int64_t most = most_tokens_at_once(l.router);
  for (int64_t first = 0; first < T; first += most) {
    const int64_t choice = first * routing.top_k;
    const Dispatch dispatch = make_dispatch(&routing.expert_ids_TK[choice], &routing.weights_TK[choice],
                                            std::min(T - first, most), routing.top_k, routing.num_experts);
    if (expert_cache_) expert_cache_->use(layer, dispatch.offset_E1);
    if (l.residual == ResidualKind::kNone) {
      add_experts(w.experts, dispatch, first);
    } else {
      add_mixture(w, l.residual, dispatch, first);
    }
  }
}

// x += y, times the residual multiplier.
void Decoder::add(const float* y_TD, int64_t T, int64_t first) {
  const int64_t D = config_.hidden_size;
  const float factor = config_.residual_multiplier;
  parallel_rows(T, D, pool_, [&](int64_t t) {
    float* x_D = x_TD_.as<float>() + (first + t) * D;
    for (int64_t i = 0; i < D; ++i) x_D[i] += factor * y_TD[t * D + i];
  });
}

// x += the experts' sum, or the MLP's, times the residual multiplier.
void Decoder::add_experts(const PackedExperts& experts, const Dispatch& dispatch, int64_t first) {
  const int64_t T = dispatch.num_tokens, D = config_.hidden_size;
  const bool direct = config_.residual_multiplier == 1;
  float* const out_TD = direct ? x_TD_.as<float>() + first * D : experts_TD_.as<float>();
  const ConstMatrix normed_TD = row_major(normed_TD_.as<const float>() + first * D, T, D);
  experts_forward(experts, dispatch, normed_TD, row_major(out_TD, T, D), pool_, /*accumulate=*/direct);
  if (!direct) add(out_TD, T, first);
}

// x += the experts and the fixed MLP beside them, as ResidualKind says.
void Decoder::add_mixture(const LayerWeights& w, ResidualKind kind, const Dispatch& dispatch, int64_t first) {
  const int64_t T = dispatch.num_tokens, D = config_.hidden_size, num_coefficients = w.mix.weight_NK.rows();
  const ConstMatrix normed_TD = row_major(normed_TD_.as<const float>() + first * D, T, D);
  experts_forward(w.experts, dispatch, normed_TD, row_major(experts_TD_.as<float>(), T, D), pool_);
  experts_forward(w.mlp, dense_dispatch(T), normed_TD, row_major(mlp_TD_.as<float>(), T, D), pool_);
  float* mix_T = router_TE_.as<float>();  // the router is done with it
  if (num_coefficients > 0) {
    gemm({.a = normed_TD,
          .packed_b = &w.mix.weight_NK,
          .c = row_major(mix_T, T, num_coefficients),
          .bias_N = w.mix.bias()},
         pool_);
  }
  parallel_rows(T, 2 * D, pool_, [&](int64_t t) {
    float experts = config_.residual_multiplier, mlp = experts;
    if (kind == ResidualKind::kLearned) {  // softmax of two is a sigmoid of their difference
      experts *= sigmoid(mix_T[2 * t] - mix_T[2 * t + 1]);
      mlp *= sigmoid(mix_T[2 * t + 1] - mix_T[2 * t]);
    } else if (kind == ResidualKind::kSharedGate) {
      mlp *= sigmoid(mix_T[t]);
    }
    float* x_D = x_TD_.as<float>() + (first + t) * D;
    const float *y_D = experts_TD_.as<float>() + t * D, *m_D = mlp_TD_.as<float>() + t * D;
    for (int64_t i = 0; i < D; ++i) x_D[i] += experts * y_D[i] + mlp * m_D[i];
  });
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
        .packed_b = &weights_.head.weight_NK,
        .c = row_major(logits_TV, T, config_.vocab_size),
        .bias_N = weights_.head.bias()},
       pool_);
  if (config_.logits_scaling == 1) return;
  parallel_rows(T, config_.vocab_size, pool_, [&](int64_t t) {
    float* const logits_V = logits_TV + t * config_.vocab_size;
    for (int64_t i = 0; i < config_.vocab_size; ++i) logits_V[i] /= config_.logits_scaling;
  });
}

}  // namespace coterie
