// config_from_gguf: what a file's metadata and the names of its tensors say of the model.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "model/gguf_end_tokens.h"
#include "model/gguf_metadata.h"
#include "model/gguf_model.h"

namespace coterie {
namespace {

void read_moe_of_mixtral(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_qwen2moe(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_qwen3moe(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_olmoe(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_granitemoe(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_phimoe(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_glm4moe(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_deepseek2(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
void read_gpt_oss(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);

// What llama.cpp knows of an architecture without being told by its files.
struct GgufArchitecture {
  const char* name;
  const char* dense;  // of transformers, when the file has no experts; null: it always has
  const char* experts;
  QkNorm qk_norm;  // where there are tensors for one
  // What is special, and how its router works: num_experts, top_k and expert_intermediate_size are there.
  void (*read)(const GgufMetadata& metadata, ModelConfig& config, LayerConfig& moe);
};
constexpr GgufArchitecture kArchitectures[] = {
    {"llama", "LlamaForCausalLM", "MixtralForCausalLM", QkNorm::kNone, read_moe_of_mixtral},
    {"qwen2", "Qwen2ForCausalLM", nullptr, QkNorm::kNone, nullptr},
    {"qwen3", "Qwen3ForCausalLM", nullptr, QkNorm::kHead, nullptr},
    {"qwen2moe", nullptr, "Qwen2MoeForCausalLM", QkNorm::kNone, read_qwen2moe},
    {"qwen3moe", nullptr, "Qwen3MoeForCausalLM", QkNorm::kHead, read_qwen3moe},
    {"olmoe", nullptr, "OlmoeForCausalLM", QkNorm::kFull, read_olmoe},
    {"granitemoe", nullptr, "GraniteMoeForCausalLM", QkNorm::kNone, read_granitemoe},
    {"phimoe", nullptr, "PhimoeForCausalLM", QkNorm::kNone, read_phimoe},
    {"glm4moe", nullptr, "Glm4MoeForCausalLM", QkNorm::kHead, read_glm4moe},
    {"deepseek2", nullptr, "DeepseekV2ForCausalLM", QkNorm::kNone, read_deepseek2},
    {"gpt-oss", nullptr, "GptOssForCausalLM", QkNorm::kNone, read_gpt_oss},
};

const GgufArchitecture& architecture_of(const GgufSource& file) {
  const GgufMetadata general(file, "general");
  const std::string name = general.text("architecture").value_or("");
  std::string known;
  for (const GgufArchitecture& architecture : kArchitectures) {
    if (name == architecture.name) return architecture;
    known += (known.empty() ? "" : ", ") + std::string(architecture.name);
  }
  general.fail("architecture", printable(name) + " is not supported (supported: " + known + ")");
}

constexpr const char* kRopeFactors = "rope_freqs.weight";

// Of the tensor of that name, by which every frequency is divided.
std::vector<double> rope_factors(const GgufSource& file, const GgufMetadata& metadata, const std::string& name,
                                 const ModelConfig& c) {
  const StoredTensor* stored = file.find(name);
  if (!stored) metadata.fail("/" + name, "is missing");
  if (stored->num_elements() != c.head_dim / 2) {
    metadata.fail("/" + name,
                  std::to_string(stored->num_elements()) + " factors, not " + std::to_string(c.head_dim / 2));
  }
  std::vector<float> factors(static_cast<size_t>(stored->num_elements()));
  file.read(name, factors.data());
  return {factors.begin(), factors.end()};
}

int64_t original_context(const GgufMetadata& metadata, int64_t least, const ModelConfig& c) {
  const std::string key = "rope.scaling.original_context_length";
  const int64_t context = metadata.integer(key).value_or(c.max_position_embeddings);
  if (context < least) metadata.fail(key, std::to_string(context) + " is below " + std::to_string(least));
  return context;
}

// llama.cpp takes the long factors wherever its context is longer than the original one, we where the text is.
void read_longrope(const GgufSource& file, const GgufMetadata& metadata, ModelConfig& c) {
  RopeScaling& scaling = c.rope_scaling;
  scaling.kind = RopeScalingKind::kLongrope;
  scaling.short_factors = rope_factors(file, metadata, "rope_factors_short.weight", c);
  scaling.long_factors = rope_factors(file, metadata, "rope_factors_long.weight", c);
  scaling.original_context = original_context(metadata, 2, c);
  scaling.attention_factor = metadata.number("rope.scaling.attn_factor").value_or(1.0);
  if (!(scaling.attention_factor > 0)) {
    metadata.fail("rope.scaling.attn_factor", std::to_string(scaling.attention_factor) + " is not positive");
  }
}

// Llama 3's scaling lies in a tensor of factors.
void read_factors(const GgufSource& file, const GgufMetadata& metadata, ModelConfig& c) {
  if (!file.find(kRopeFactors)) return;
  c.rope_scaling.kind = RopeScalingKind::kFactors;
  c.rope_scaling.factors = rope_factors(file, metadata, kRopeFactors, c);
}

void read_yarn(const GgufMetadata& metadata, double log_multiplier, ModelConfig& c) {
  RopeScaling& scaling = c.rope_scaling;
  scaling.kind = RopeScalingKind::kYarn;
  scaling.original_context = original_context(metadata, 1, c);
  scaling.beta_fast = metadata.number("rope.scaling.yarn_beta_fast").value_or(scaling.beta_fast);
  scaling.beta_slow = metadata.number("rope.scaling.yarn_beta_slow").value_or(scaling.beta_slow);
  scaling.mscale = scaling.mscale_all_dim = log_multiplier / 0.1;
}

// One way at a time: what belongs to another is refused, not left out.
void read_rope_scaling(const GgufSource& file, const GgufMetadata& metadata, ModelConfig& c) {
  const bool by_length = file.find("rope_factors_long.weight") || file.find("rope_factors_short.weight");
  const std::string type = metadata.text("rope.scaling.type").value_or("none");
  const double factor = metadata.number("rope.scaling.factor").value_or(1.0);
  const double log_multiplier = metadata.number("rope.scaling.yarn_log_multiplier").value_or(0.0);
  metadata.ignore("rope.scaling.original_context_length");
  metadata.ignore("rope.scaling.finetuned");
  const std::string beside =
      " does not go with " + (by_length ? "rope_factors_long.weight" : "rope.scaling.type " + printable(type));
  if (by_length && type != "none" && type != "longrope") metadata.fail("rope.scaling.type", printable(type) + beside);
  if (by_length && factor != 1.0) metadata.fail("rope.scaling.factor", std::to_string(factor) + beside);
  if (!by_length && type != "none" && type != "linear" && type != "yarn") {
    metadata.fail("rope.scaling.type", printable(type) + " is not supported (supported: none, linear, yarn)");
  }
  if (file.find(kRopeFactors) && (by_length || type != "none")) metadata.fail("/rope_freqs.weight", beside.substr(1));
  if (log_multiplier != 0 && (by_length || type == "linear")) {
    metadata.fail("rope.scaling.yarn_log_multiplier", std::to_string(log_multiplier) + beside);
  }
  if (by_length) return read_longrope(file, metadata, c);
  if (factor < 1.0) metadata.fail("rope.scaling.factor", std::to_string(factor) + " is below 1");
  if (type == "none" && factor != 1.0) metadata.fail("rope.scaling.factor", "is given without rope.scaling.type");
  if (type == "none") return read_factors(file, metadata, c);
  c.rope_scaling.factor = factor;
  c.rope_scaling.kind = RopeScalingKind::kLinear;
  if (type == "yarn") read_yarn(metadata, log_multiplier, c);
}

void read_heads(const GgufSource& file, const GgufMetadata& metadata, ModelConfig& c) {
  c.num_heads = metadata.required_integer("attention.head_count");
  c.num_kv_heads = metadata.integer("attention.head_count_kv").value_or(c.num_heads);
  const std::optional<int64_t> key_length = metadata.integer("attention.key_length");
  if (c.num_heads < 1 || (!key_length && c.hidden_size % c.num_heads != 0)) {
    metadata.fail("attention.head_count", std::to_string(c.num_heads) + " does not divide embedding_length (" +
                                              std::to_string(c.hidden_size) + ")");
  }
  c.head_dim = key_length.value_or(c.hidden_size / c.num_heads);
  c.rope_theta = metadata.number("rope.freq_base").value_or(10000.0);
  c.attention_bias = file.find("blk.0.attn_q.bias") || file.find("blk.0.attn_kv_a_mqa.bias");
  c.attention_output_bias = file.find("blk.0.attn_output.bias") != nullptr;
}

// Heads are turned as a whole, and values are as wide as keys, unless an architecture has read these itself.
void check_widths(const GgufMetadata& metadata, const ModelConfig& c) {
  if (c.is_latent()) return;
  metadata.only("attention.value_length", c.head_dim);
  metadata.only("rope.dimension_count", c.num_rotary_dims());
}

void read_norms(const GgufSource& file, const GgufMetadata& metadata, ModelConfig& c) {
  c.norm = file.find("output_norm.bias") ? NormKind::kLayerNorm : NormKind::kRmsNorm;
  const std::optional<double> eps = metadata.number("attention.layer_norm_rms_epsilon");
  if (!eps) metadata.fail("attention.layer_norm_rms_epsilon", "is missing");
  c.norm_eps = static_cast<float>(*eps);
}

int64_t read_vocab_size(const GgufSource& file, const GgufMetadata& metadata) {
  const StoredTensor* embeddings = file.find("token_embd.weight");
  if (!embeddings || embeddings->shape.size() != 2) metadata.fail("/token_embd.weight", "is missing or not a matrix");
  metadata.only("vocab_size", embeddings->shape[0]);
  return embeddings->shape[0];
}

// Without the layers that predict further tokens, which we don't use.
int64_t read_num_layers(const GgufSource& file, const GgufMetadata& metadata) {
  const int64_t blocks = metadata.required_integer("block_count");
  if (blocks < 1 || blocks > static_cast<int64_t>(file.tensors().size())) {  // before anything of that size
    metadata.fail("block_count", std::to_string(blocks) + " layers do not fit the file's " +
                                     std::to_string(file.tensors().size()) + " tensors");
  }
  const int64_t predicting = metadata.integer("nextn_predict_layers").value_or(0);
  if (predicting < 0 || predicting >= blocks) {
    metadata.fail("nextn_predict_layers", std::to_string(predicting) + " of " + std::to_string(blocks) + " layers");
  }
  return blocks - predicting;
}

LayerConfig read_moe_sizes(const GgufMetadata& metadata, int64_t feed_forward) {
  LayerConfig moe;
  moe.router.num_experts = metadata.integer("expert_count").value_or(0);
  moe.router.top_k = metadata.integer("expert_used_count").value_or(0);
  moe.expert_intermediate_size = metadata.integer("expert_feed_forward_length").value_or(feed_forward);
  return moe;
}

void read_layers(const GgufSource& file, const GgufMetadata& metadata, const GgufArchitecture& architecture,
                 ModelConfig& c) {
  const int64_t num_layers = read_num_layers(file, metadata);
  LayerConfig dense;
  dense.intermediate_size = metadata.integer("feed_forward_length").value_or(0);
  LayerConfig moe = read_moe_sizes(metadata, dense.intermediate_size);
  const bool has_experts = architecture.experts && (!architecture.dense || moe.is_moe());
  if (!has_experts) {
    metadata.only("expert_count", 0);
    moe = {};
  }
  c.architecture = has_experts ? architecture.experts : architecture.dense;
  if (has_experts) architecture.read(metadata, c, moe);
  const int64_t num_dense = has_experts ? metadata.integer("leading_dense_block_count").value_or(0) : num_layers;
  if (num_dense < 0 || num_dense > num_layers) {
    metadata.fail("leading_dense_block_count", std::to_string(num_dense) + " of " + std::to_string(num_layers));
  }
  c.layers.assign(static_cast<size_t>(num_layers), moe);
  std::fill_n(c.layers.begin(), num_dense, dense);
}

void read_moe_of_mixtral(const GgufMetadata&, ModelConfig&, LayerConfig& moe) { moe.router.normalize = true; }

void read_qwen2moe(const GgufMetadata& metadata, ModelConfig&, LayerConfig& moe) {
  moe.residual = ResidualKind::kSharedGate;
  moe.intermediate_size = metadata.required_integer("expert_shared_feed_forward_length");
}

void read_qwen3moe(const GgufMetadata&, ModelConfig&, LayerConfig& moe) { moe.router.normalize = true; }

void read_olmoe(const GgufMetadata& metadata, ModelConfig& c, LayerConfig&) {
  c.clip_qkv = static_cast<float>(metadata.number("attention.clamp_kqv").value_or(0.0));
}

void read_granitemoe(const GgufMetadata& metadata, ModelConfig& c, LayerConfig& moe) {
  moe.router.normalize = true;
  c.embedding_multiplier = static_cast<float>(metadata.number("embedding_scale").value_or(1.0));
  c.attention_multiplier = static_cast<float>(metadata.number("attention.scale").value_or(0.0));
  c.residual_multiplier = static_cast<float>(metadata.number("residual_scale").value_or(1.0));
  c.logits_scaling = static_cast<float>(metadata.number("logit_scale").value_or(1.0));
  metadata.only("expert_shared_feed_forward_length", 0);
}

void read_phimoe(const GgufMetadata& metadata, ModelConfig& c, LayerConfig& moe) {
  moe.router.score_function = ScoreFunction::kSparsemixer;
  const int64_t window = metadata.integer("attention.sliding_window").value_or(0);
  if (window > 0 && window < c.max_position_embeddings) moe.window = window;
}

// DeepSeek's routers, which others have as well.
void read_gated_experts(const GgufMetadata& metadata, int64_t default_gate, LayerConfig& moe) {
  constexpr int64_t kSoftmax = 1, kSigmoid = 2;
  const int64_t gate = metadata.integer("expert_gating_func").value_or(default_gate);
  if (gate != kSoftmax && gate != kSigmoid) {
    metadata.fail("expert_gating_func", std::to_string(gate) + " is not supported (supported: 1, 2)");
  }
  RouterConfig& router = moe.router;
  const bool sigmoid = gate == kSigmoid;
  router.score_function = sigmoid ? ScoreFunction::kSigmoid : ScoreFunction::kSoftmax;
  router.group_score = sigmoid ? GroupScore::kTopTwo : GroupScore::kMax;
  router.choice_bias = sigmoid;
  router.normalize = metadata.boolean("expert_weights_norm").value_or(false);
  router.routed_scaling = static_cast<float>(metadata.number("expert_weights_scale").value_or(1.0));
  router.num_groups = metadata.integer("expert_group_count").value_or(1);
  router.top_k_groups = metadata.integer("expert_group_used_count").value_or(1);
  const int64_t shared = metadata.integer("expert_shared_count").value_or(0);
  if (shared < 0 || shared > 1 << 16) metadata.fail("expert_shared_count", std::to_string(shared) + " of them");
  moe.intermediate_size = shared * std::clamp<int64_t>(moe.expert_intermediate_size, 0, 1 << 24);
  moe.residual = shared > 0 ? ResidualKind::kSum : ResidualKind::kNone;
}

void read_glm4moe(const GgufMetadata& metadata, ModelConfig& c, LayerConfig& moe) {
  const int64_t turned = metadata.integer("rope.dimension_count").value_or(c.head_dim);
  if (turned != c.head_dim) c.rotary_dim = turned;
  read_gated_experts(metadata, 2, moe);
}

// Files from before the cache of latent vectors say key_length of whole keys, later ones of what is cached.
void read_deepseek2(const GgufMetadata& metadata, ModelConfig& c, LayerConfig& moe) {
  LatentAttention& l = c.latent;
  l.kv_rank = metadata.required_integer("attention.kv_lora_rank");
  l.q_rank = metadata.integer("attention.q_lora_rank").value_or(0);
  l.rope_dim = metadata.required_integer("rope.dimension_count");
  const int64_t key = metadata.required_integer("attention.key_length");
  const int64_t value = metadata.required_integer("attention.value_length");
  c.head_dim = metadata.integer("attention.key_length_mla").value_or(key);
  l.v_dim = metadata.integer("attention.value_length_mla").value_or(value);
  l.nope_dim = c.head_dim - l.rope_dim;
  l.norm_eps = c.norm_eps;
  c.num_kv_heads = c.num_heads;
  c.rope_interleaved = true;
  if (c.rope_scaling.mscale_all_dim != 0) {
    const double mscale = yarn_mscale(c.rope_scaling.factor, c.rope_scaling.mscale_all_dim);
    c.attention_multiplier = static_cast<float>(mscale * mscale / std::sqrt(static_cast<double>(c.head_dim)));
  }
  read_gated_experts(metadata, 1, moe);
  if (moe.router.choice_bias) c.architecture = "DeepseekV3ForCausalLM";
}

void read_gpt_oss(const GgufMetadata& metadata, ModelConfig& c, LayerConfig& moe) {
  c.activation = Activation::kClampedSwiglu;
  c.attention_sinks = c.mlp_bias = true;
  c.rope_scaling.truncate = false;
  moe.router.normalize = moe.router.logit_bias = true;
  moe.window = metadata.required_integer("attention.sliding_window");  // of every second layer
}

// The tensor must have a number or more for each of the `count`.
void check_room(const GgufSource& file, const GgufMetadata& metadata, const std::string& key, int64_t count,
                const std::string& tensor) {
  const StoredTensor* stored = file.find(tensor);
  if (!stored) metadata.fail("/" + tensor, "is missing");
  if (count <= stored->num_elements()) return;
  metadata.fail(key, std::to_string(count) + " is more than the " + std::to_string(stored->num_elements()) +
                         " numbers of " + tensor);
}

// Before anything is made for each expert or head of each layer: a small file may speak of many. What shapes must be
// exactly, the map of tensors says.
void check_counts(const GgufSource& file, const GgufMetadata& metadata, const ModelConfig& c) {
  const std::string query = c.is_latent() && c.latent.q_rank > 0 ? "attn_q_b.weight" : "attn_q.weight";
  for (size_t n = 0; n < c.layers.size(); ++n) {
    const std::string layer = "blk." + std::to_string(n) + ".";
    check_room(file, metadata, "attention.head_count", c.num_heads, layer + query);
    if (!c.layers[n].is_moe()) continue;
    check_room(file, metadata, "expert_count", c.layers[n].router.num_experts, layer + "ffn_gate_inp.weight");
  }
}

}  // namespace

ModelConfig config_from_gguf(const GgufSource& file) {
  const GgufArchitecture& architecture = architecture_of(file);
  const GgufMetadata metadata(file, architecture.name);
  ModelConfig c;
  c.vocab_size = read_vocab_size(file, metadata);
  c.hidden_size = metadata.required_integer("embedding_length");
  c.max_position_embeddings = metadata.required_integer("context_length");
  read_norms(file, metadata, c);
  read_heads(file, metadata, c);
  read_rope_scaling(file, metadata, c);
  if (file.find("blk.0.attn_q_norm.weight")) c.qk_norm = architecture.qk_norm;
  c.mlp_bias = file.find("blk.0.ffn_down.bias") != nullptr;
  c.tie_word_embeddings = file.find("output.weight") == nullptr;
  c.lm_head_bias = file.find("output.bias") != nullptr;
  c.bos_token_id = metadata.token_id("/tokenizer.ggml.bos_token_id").value_or(-1);
  c.eos_token_ids = end_tokens_of_gguf(metadata);
  read_layers(file, metadata, architecture, c);
  if (c.attention_sinks) {
    for (size_t n = 1; n < c.layers.size(); n += 2) c.layers[n].window = 0;
  }
  check_widths(metadata, c);
  metadata.refuse_unknown();
  c.validate(file.path());
  check_counts(file, metadata, c);
  return c;
}

}  // namespace coterie
