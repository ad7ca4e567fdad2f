// GPT2LMHeadModel of Hugging Face transformers: LayerNorm, learned positions, biases everywhere.
#include <map>

#include "base/check.h"
#include "model/architectures.h"

namespace coterie {
namespace {

void refuse_what_we_lack(const ConfigReader& json) {
  if (!json.boolean("scale_attn_weights", true)) json.fail("scale_attn_weights", "false is not supported");
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"}) {
    if (json.boolean(key, false)) json.fail(key, "true is not supported");
  }
  refuse_quantization(json);
}

// The older configurations on the hub have n_ctx beside n_positions; n_positions is what counts.
ModelConfig read_config(const ConfigReader& json) {
  refuse_what_we_lack(json);
  ModelConfig c;
  c.vocab_size = json.integer("vocab_size", 50257);
  c.hidden_size = json.integer("n_embd", 768);
  if (c.hidden_size < 1 || c.hidden_size > 1 << 22) {
    json.fail("n_embd", std::to_string(c.hidden_size) + " is not in [1, 4194304]");
  }
  c.num_heads = c.num_kv_heads = json.integer("n_head", 12);
  if (c.num_heads < 1 || c.hidden_size % c.num_heads != 0) {
    json.fail("n_head",
              std::to_string(c.num_heads) + " does not divide n_embd (" + std::to_string(c.hidden_size) + ")");
  }
  c.head_dim = c.hidden_size / c.num_heads;
  c.max_position_embeddings = json.integer("n_positions", 1024);
  c.norm = NormKind::kLayerNorm;
  c.norm_eps = static_cast<float>(json.number("layer_norm_epsilon", 1e-5));
  c.positions = PositionKind::kLearned;
  c.activation = read_activation(json, "activation_function", "gelu_new");
  c.gated_mlp = false;
  c.attention_bias = c.attention_output_bias = c.mlp_bias = true;
  c.tie_word_embeddings = json.boolean("tie_word_embeddings", true);
  c.initializer_range = static_cast<float>(json.number("initializer_range", 0.02));
  c.bos_token_id = json.present("bos_token_id") ? json.integer("bos_token_id", -1) : 50256;
  c.eos_token_ids = read_token_ids(json, "eos_token_id");
  if (!json.present("eos_token_id")) c.eos_token_ids = {50256};

  LayerConfig layer;
  layer.intermediate_size = json.has("n_inner") ? json.integer("n_inner") : 4 * c.hidden_size;
  c.layers.assign(read_num_layers(json, "n_layer", 12), layer);
  return c;
}

Json write_config(const ModelConfig& c) {
  return {{"architectures", Json::array({"GPT2LMHeadModel"})},
          {"model_type", "gpt2"},
          {"vocab_size", c.vocab_size},
          {"n_embd", c.hidden_size},
          {"n_layer", c.num_layers()},
          {"n_head", c.num_heads},
          {"n_positions", c.max_position_embeddings},
          {"n_inner", c.layers[0].intermediate_size},
          {"activation_function", activation_name(c.activation)},
          {"layer_norm_epsilon", shortest_decimal(c.norm_eps)},
          {"tie_word_embeddings", c.tie_word_embeddings},
          {"initializer_range", shortest_decimal(c.initializer_range)},
          {"bos_token_id", optional_id_json(c.bos_token_id)},
          {"eos_token_id", token_ids_json(c.eos_token_ids)}};
}

// q, k and v lie side by side in c_attn.
std::vector<std::vector<Piece>> fused_attention(const TensorSpec& spec, const std::string& stored, int64_t part) {
  const int64_t columns = spec.shape[0];
  Piece piece = whole_piece(spec, stored, /*transposed=*/true);
  piece.first = part * columns;
  piece.stored_shape.back() = 3 * columns;
  if (spec.shape.size() > 1) piece.col_stride = 3 * columns;
  return {{piece}};
}

CheckpointMap checkpoint_map(const ModelConfig& config) {
  static const std::map<std::string, std::string> kNames = {
      {"model.embed_tokens", "transformer.wte"},
      {"model.embed_positions", "transformer.wpe"},
      {"model.norm", "transformer.ln_f"},
      {"lm_head", "lm_head"},
      {"input_norm", "ln_1"},
      {"post_attention_norm", "ln_2"},
      {"attention.o_proj", "attn.c_proj"},
      {"mlp.up", "mlp.c_fc"},
      {"mlp.down", "mlp.c_proj"},
  };
  static const std::map<std::string, int64_t> kFused = {
      {"attention.q_proj", 0}, {"attention.k_proj", 1}, {"attention.v_proj", 2}};
  CheckpointMap map = map_tensors(config, [](const LogicalName& name, const TensorSpec& spec) {
    const bool in_layer = name.layer >= 0;
    const std::string prefix = in_layer ? "transformer.h." + std::to_string(name.layer) + "." : "";
    if (const auto part = kFused.find(name.module); part != kFused.end()) {
      return fused_attention(spec, prefix + "attn.c_attn." + name.kind, part->second);
    }
    const auto stored = kNames.find(name.module);
    COTERIE_CHECK(stored != kNames.end(), spec.name + " has no place in GPT-2");
    // Conv1D keeps its weights [in, out]; embeddings and the head are as ours.
    return std::vector<std::vector<Piece>>{
        {whole_piece(spec, prefix + stored->second + "." + name.kind, /*transposed=*/in_layer)}};
  });
  map.base_prefix = "transformer.";
  map.ignored_suffixes = {".attn.bias", ".attn.masked_bias"};
  if (config.tie_word_embeddings) map.ignored_suffixes.push_back("lm_head.weight");
  return map;
}

}  // namespace

const Architecture kGpt2Architecture = {"GPT2LMHeadModel", "gpt2", read_config, write_config, checkpoint_map};

}  // namespace coterie
