// GPT2LMHeadModel of Hugging Face transformers: LayerNorm, learned positions, biases everywhere.
#include "model/architectures.h"

namespace coterie {
namespace {

void refuse_what_we_lack(const ConfigReader& json) {
  if (!json.boolean("scale_attn_weights", true)) json.fail("scale_attn_weights", "false is not supported");
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"}) {
    if (json.boolean(key, false)) json.fail(key, "true is not supported");
  }
  if (json.has("quantization_config"))
    json.fail("quantization_config", "quantized weights of this kind are not supported");
}

// The older configurations on the hub have n_ctx beside n_positions; n_positions is what counts.
ModelConfig read_config(const ConfigReader& json) {
  refuse_what_we_lack(json);
  ModelConfig c;
  c.vocab_size = json.integer("vocab_size", 50257);
  c.hidden_size = json.integer("n_embd", 768);
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
  layer.intermediate_size = json.integer("n_inner", 4 * c.hidden_size);
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

}  // namespace

const Architecture kGpt2Architecture = {"GPT2LMHeadModel", "gpt2", read_config, write_config};

}  // namespace coterie
