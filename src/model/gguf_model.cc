#include "model/gguf_model.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "coterie/error.h"
#include "io/printable.h"

namespace coterie {
namespace {

// The metadata of a model whose keys begin with "llama.", checked while it is read.
class Metadata {
 public:
  explicit Metadata(const GgufSource& file) : file_(file) {}

  [[noreturn]] void fail(const std::string& key, const std::string& what) const {
    throw InvalidArgument(file_.path() + ": " + key + ": " + what);
  }

  template <typename T>
  std::optional<T> get(const std::string& key, const char* type) const {
    asked_.insert(key);
    const GgufValue* value = file_.find_metadata(key);
    if (!value) return std::nullopt;
    const T* typed = std::get_if<T>(value);
    if (!typed) fail(key, std::string("is not ") + type);
    return *typed;
  }

  std::optional<int64_t> integer(const std::string& key) const { return get<int64_t>(key, "a whole number"); }
  std::optional<double> number(const std::string& key) const { return get<double>(key, "a number"); }
  std::optional<std::string> text(const std::string& key) const { return get<std::string>(key, "a string"); }

  int64_t required_integer(const std::string& key) const {
    const std::optional<int64_t> value = integer(key);
    if (!value) fail(key, "is missing");
    return *value;
  }

  // For a key that says what we do anyway.
  void only(const std::string& key, int64_t supported) const {
    const int64_t value = integer(key).value_or(supported);
    if (value != supported) {
      fail(key, std::to_string(value) + " is not supported (" + std::to_string(supported) + " is)");
    }
  }

  void refuse_unknown(const std::string& prefix) const {
    for (const auto& [key, value] : file_.metadata()) {
      if (key.starts_with(prefix) && !asked_.contains(key)) fail(printable(key), "is not supported");
    }
  }

 private:
  const GgufSource& file_;
  mutable std::set<std::string> asked_;
};

// Scaled rotary positions are told by metadata (linear, YaRN) or by a tensor of factors (Llama 3).
void refuse_rope_scaling(const GgufSource& file, const Metadata& metadata) {
  const std::string type = metadata.text("llama.rope.scaling.type").value_or("none");
  if (type != "none") metadata.fail("llama.rope.scaling.type", printable(type) + " is not supported ('none' is)");
  for (const char* key : {"llama.rope.scaling.factor", "llama.rope.scale_linear"}) {
    if (metadata.number(key).value_or(1.0) != 1.0) metadata.fail(key, "scaled rotary positions are not supported");
  }
  for (const char* name : {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}) {
    if (file.find(name)) metadata.fail(name, "scaled rotary positions are not supported");
  }
}

void read_attention(const GgufSource& file, const Metadata& metadata, ModelConfig& config) {
  config.num_heads = metadata.required_integer("llama.attention.head_count");
  config.num_kv_heads = metadata.integer("llama.attention.head_count_kv").value_or(config.num_heads);
  const std::optional<int64_t> key_length = metadata.integer("llama.attention.key_length");
  if (config.num_heads < 1 || (!key_length && config.hidden_size % config.num_heads != 0)) {
    metadata.fail("llama.attention.head_count", std::to_string(config.num_heads) +
                                                    " does not divide llama.embedding_length (" +
                                                    std::to_string(config.hidden_size) + ")");
  }
  config.head_dim = key_length.value_or(config.hidden_size / config.num_heads);
  metadata.only("llama.attention.value_length", config.head_dim);
  metadata.only("llama.rope.dimension_count", config.head_dim);
  config.rope_theta = metadata.number("llama.rope.freq_base").value_or(10000.0);
  config.attention_bias = file.find("blk.0.attn_q.bias") != nullptr;
  config.attention_output_bias = file.find("blk.0.attn_output.bias") != nullptr;
}

void read_tokens(const Metadata& metadata, ModelConfig& config) {
  config.bos_token_id = metadata.integer("tokenizer.ggml.bos_token_id").value_or(-1);
  // A chat model ends its turn with a token of its own where it has one.
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    const std::optional<int64_t> id = metadata.integer(key);
    const bool known = config.eos_token_ids.size() == 1 && config.eos_token_ids[0] == id;
    if (id && !known) config.eos_token_ids.push_back(*id);
  }
}

int64_t read_vocab_size(const GgufSource& file, const Metadata& metadata) {
  const StoredTensor* embeddings = file.find("token_embd.weight");
  if (!embeddings || embeddings->shape.size() != 2) metadata.fail("token_embd.weight", "is missing or not a matrix");
  metadata.only("llama.vocab_size", embeddings->shape[0]);
  return embeddings->shape[0];
}

// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; other names stay as they are.
std::string checkpoint_name(const std::string& name) {
  static const std::map<std::string, std::string> top = {
      {"token_embd", "model.embed_tokens"}, {"output_norm", "model.norm"}, {"output", "lm_head"}};
  static const std::map<std::string, std::string> in_layer = {
      {"attn_norm", "input_layernorm"}, {"attn_q", "self_attn.q_proj"},      {"attn_k", "self_attn.k_proj"},
      {"attn_v", "self_attn.v_proj"},   {"attn_output", "self_attn.o_proj"}, {"ffn_norm", "post_attention_layernorm"},
      {"ffn_gate", "mlp.gate_proj"},    {"ffn_up", "mlp.up_proj"},           {"ffn_down", "mlp.down_proj"}};
  const size_t kind = name.rfind('.');  // ".weight" or ".bias"
  if (kind == std::string::npos) return name;
  if (const auto found = top.find(name.substr(0, kind)); found != top.end()) return found->second + name.substr(kind);
  const std::string prefix = "blk.";
  const size_t layer_end = name.find('.', prefix.size());
  if (!name.starts_with(prefix) || layer_end >= kind) return name;
  const auto found = in_layer.find(name.substr(layer_end + 1, kind - layer_end - 1));
  if (found == in_layer.end()) return name;
  return "model.layers." + name.substr(prefix.size(), layer_end - prefix.size() + 1) + found->second +
         name.substr(kind);
}

}  // namespace

ModelConfig config_from_gguf(const GgufSource& file) {
  const Metadata metadata(file);
  const std::string architecture = metadata.text("general.architecture").value_or("");
  if (architecture != "llama") {
    metadata.fail("general.architecture", printable(architecture) + " is not supported ('llama' is)");
  }
  ModelConfig config;
  config.architecture = "LlamaForCausalLM";
  config.vocab_size = read_vocab_size(file, metadata);
  config.hidden_size = metadata.required_integer("llama.embedding_length");
  config.max_position_embeddings = metadata.required_integer("llama.context_length");
  const std::optional<double> eps = metadata.number("llama.attention.layer_norm_rms_epsilon");
  if (!eps) metadata.fail("llama.attention.layer_norm_rms_epsilon", "is missing");
  config.norm_eps = static_cast<float>(*eps);
  read_attention(file, metadata, config);
  refuse_rope_scaling(file, metadata);
  metadata.only("llama.expert_count", 0);
  metadata.only("llama.expert_used_count", 0);
  config.mlp_bias = file.find("blk.0.ffn_down.bias") != nullptr;
  config.tie_word_embeddings = file.find("output.weight") == nullptr;
  read_tokens(metadata, config);

  const int64_t num_layers = metadata.required_integer("llama.block_count");
  if (num_layers < 1 || num_layers > static_cast<int64_t>(file.tensors().size())) {  // before anything of that size
    metadata.fail("llama.block_count", std::to_string(num_layers) + " layers do not fit the file's " +
                                           std::to_string(file.tensors().size()) + " tensors");
  }
  LayerConfig layer;
  layer.intermediate_size = metadata.required_integer("llama.feed_forward_length");
  config.layers.assign(static_cast<size_t>(num_layers), layer);
  metadata.refuse_unknown("llama.");
  config.validate(file.path());
  return config;
}

GgufLlamaSource::GgufLlamaSource(const GgufSource& file, const ModelConfig& config) : file_(file) {
  for (const StoredTensor& stored : file.tensors()) {
    StoredTensor& tensor = tensors_.emplace_back(stored);
    tensor.name = checkpoint_name(stored.name);
    Place place{tensors_.size() - 1};
    if (tensor.name.find(".self_attn.q_proj.") != std::string::npos) place.turned_heads = config.num_heads;
    if (tensor.name.find(".self_attn.k_proj.") != std::string::npos) place.turned_heads = config.num_kv_heads;
    if (place.turned_heads > 0 && (tensor.shape.empty() || tensor.shape[0] != place.turned_heads * config.head_dim)) {
      throw CorruptFile(path() + ": tensor " + printable(stored.name) + ": its rows are not " +
                        std::to_string(place.turned_heads) + " heads of " + std::to_string(config.head_dim));
    }
    if (!places_.emplace(tensor.name, place).second) {
      throw CorruptFile(path() + ": tensor " + printable(stored.name) + ": occurs twice, as " + printable(tensor.name));
    }
  }
}

const StoredTensor* GgufLlamaSource::find(const std::string& name) const {
  const auto found = places_.find(name);
  return found == places_.end() ? nullptr : &tensors_[found->second.index];
}

void GgufLlamaSource::read(const std::string& name, float* out) const {
  const auto found = places_.find(name);
  if (found == places_.end()) throw InvalidArgument(path() + ": there is no tensor " + printable(name));
  const auto [index, turned_heads] = found->second;
  const StoredTensor& stored = file_.tensors()[index];
  if (turned_heads == 0) {
    file_.read(stored.name, out);
    return;
  }
  std::vector<float> turned(static_cast<size_t>(stored.num_elements()));
  file_.read(stored.name, turned.data());
  const int64_t rows = stored.shape[0], cols = stored.num_elements() / rows;
  const int64_t head_dim = rows / turned_heads;
  for (int64_t row = 0; row < rows; ++row) {  // of the file: row 2 i + s of its head
    const int64_t in_head = row % head_dim;
    const int64_t row_out = row - in_head + in_head % 2 * (head_dim / 2) + in_head / 2;
    std::copy_n(turned.data() + row * cols, cols, out + row_out * cols);
  }
}

}  // namespace coterie
