#include "model/tensors.h"

namespace coterie {
namespace {

// Collects the tensors of one model under a moving prefix.
class Listing {
 public:
  explicit Listing(const ModelConfig& config) : config_(config) {}

  void add(const std::string& name, std::vector<int64_t> shape) { tensors_.push_back({name, std::move(shape)}); }

  void add_norm(const std::string& name, int64_t size) {
    add(name + ".weight", {size});
    if (config_.norm == NormKind::kLayerNorm) add(name + ".bias", {size});
  }

  void add_linear(const std::string& name, int64_t out, int64_t in, bool bias) {
    add(name + ".weight", {out, in});
    if (bias) add(name + ".bias", {out});
  }

  void add_attention(const std::string& layer) {
    const ModelConfig& c = config_;
    const std::string name = layer + "attention.";
    if (c.is_latent()) add_latent_projections(name);
    if (!c.is_latent()) add_projections(name);
    add_linear(name + "o_proj", c.hidden_size, c.attention_width(), c.attention_output_bias);
    if (c.attention_sinks) add(name + "sinks.weight", {c.num_heads});
  }

  void add_latent_projections(const std::string& name) {
    const ModelConfig& c = config_;
    const LatentAttention& l = c.latent;
    const int64_t q = c.num_heads * c.head_dim;
    if (l.q_rank == 0) {
      add_linear(name + "q_proj", q, c.hidden_size, false);
    } else {
      add_linear(name + "q_a_proj", l.q_rank, c.hidden_size, c.attention_bias);
      add(name + "q_a_norm.weight", {l.q_rank});
      add_linear(name + "q_b_proj", q, l.q_rank, false);
    }
    add_linear(name + "kv_a_proj", l.kv_rank + l.rope_dim, c.hidden_size, c.attention_bias);
    add(name + "kv_a_norm.weight", {l.kv_rank});
    add_linear(name + "kv_b_proj", c.num_heads * (l.nope_dim + l.v_dim), l.kv_rank, false);
  }

  void add_projections(const std::string& name) {
    const ModelConfig& c = config_;
    const int64_t q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
    add_linear(name + "q_proj", q, c.hidden_size, c.attention_bias);
    add_linear(name + "k_proj", kv, c.hidden_size, c.attention_bias);
    add_linear(name + "v_proj", kv, c.hidden_size, c.attention_bias);
    if (c.qk_norm != QkNorm::kNone) {
      const bool full = c.qk_norm == QkNorm::kFull;
      add(name + "q_norm.weight", {full ? q : c.head_dim});
      add(name + "k_norm.weight", {full ? kv : c.head_dim});
    }
  }

  // experts == 0: a plain MLP, else a stack of them.
  void add_mlp(const std::string& name, int64_t experts, int64_t inner) {
    const int64_t up = config_.gated_mlp ? 2 * inner : inner;
    const auto stacked = [experts](std::vector<int64_t> shape) {
      if (experts > 0) shape.insert(shape.begin(), experts);
      return shape;
    };
    add(name + ".up.weight", stacked({up, config_.hidden_size}));
    if (config_.mlp_bias) add(name + ".up.bias", stacked({up}));
    add(name + ".down.weight", stacked({config_.hidden_size, inner}));
    if (config_.mlp_bias) add(name + ".down.bias", stacked({config_.hidden_size}));
  }

  void add_feed_forward(const std::string& layer, const LayerConfig& l) {
    if (l.intermediate_size > 0) add_mlp(layer + "mlp", 0, l.intermediate_size);
    if (!l.is_moe()) return;
    add_linear(layer + "router", l.router.num_experts, config_.hidden_size, l.router.logit_bias);
    if (l.router.choice_bias) add(layer + "router.choice_bias", {l.router.num_experts});
    add_mlp(layer + "experts", l.router.num_experts, l.expert_intermediate_size);
    if (l.residual == ResidualKind::kLearned) add_linear(layer + "mix", 2, config_.hidden_size, true);
    if (l.residual == ResidualKind::kSharedGate) add_linear(layer + "mix", 1, config_.hidden_size, false);
  }

  std::vector<TensorSpec> take() { return std::move(tensors_); }

 private:
  const ModelConfig& config_;
  std::vector<TensorSpec> tensors_;
};

}  // namespace

int64_t TensorSpec::num_elements() const {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  return n;
}

std::vector<TensorSpec> logical_tensors(const ModelConfig& config) {
  Listing listing(config);
  listing.add("model.embed_tokens.weight", {config.vocab_size, config.hidden_size});
  if (config.positions == PositionKind::kLearned) {
    listing.add("model.embed_positions.weight", {config.max_position_embeddings, config.hidden_size});
  }
  for (int64_t n = 0; n < config.num_layers(); ++n) {
    const std::string layer = "model.layers." + std::to_string(n) + ".";
    listing.add_norm(layer + "input_norm", config.hidden_size);
    listing.add_attention(layer);
    listing.add_norm(layer + "post_attention_norm", config.hidden_size);
    listing.add_feed_forward(layer, config.layers[n]);
  }
  listing.add_norm("model.norm", config.hidden_size);
  if (!config.tie_word_embeddings) listing.add("lm_head.weight", {config.vocab_size, config.hidden_size});
  if (config.lm_head_bias) listing.add("lm_head.bias", {config.vocab_size});
  return listing.take();
}

}  // namespace coterie
