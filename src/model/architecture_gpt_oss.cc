// GptOssForCausalLM of transformers: sinks, alternating windows, biases everywhere, a clamped gate, and experts whose
// gate and up rows alternate, in MXFP4 or as plain transposed matrices.
#include <cmath>
#include <map>

#include "base/check.h"
#include "model/architectures.h"
#include "model/transformers_family.h"

namespace coterie {
namespace {

constexpr Defaults kGptOss = {201088, 2880, 2880, 36, 64, 8, 131072, 1e-5, 150000.0, -1, -1};

void refuse_other_gates(const ConfigReader& json) {
  for (const auto& [key, value] : {std::pair("swiglu_alpha", kSwigluAlpha), std::pair("swiglu_limit", kSwigluLimit)}) {
    const auto given = static_cast<float>(json.number(key, value));
    if (given != value) {
      json.fail(key, Json(shortest_decimal(given)).dump() + " is not supported (only " +
                         Json(shortest_decimal(value)).dump() + ")");
    }
  }
  const std::string activation = json.text("hidden_act", "silu");  // not what the experts compute, which is fixed
  if (activation != "silu") json.fail("hidden_act", "'" + activation + "' is not supported (only 'silu')");
}

void read_windows(const ConfigReader& json, ModelConfig& c) {
  const int64_t window = json.present("sliding_window") ? read_window(json) : 128;
  std::vector<bool> slides(c.layers.size());
  for (size_t n = 0; n < slides.size(); ++n) slides[n] = n % 2 == 0;
  if (json.has("layer_types")) slides = read_layer_types(json, c.num_layers());
  for (size_t n = 0; n < slides.size(); ++n) c.layers[n].window = slides[n] ? window : 0;
}

ModelConfig read_config(const ConfigReader& json) {
  ModelConfig c = read_family(json, kGptOss, {.head_dim = 64, .mxfp4 = true});
  refuse_other_gates(json);
  if (!json.has("rope_scaling") && !json.has("rope_parameters")) {
    c.rope_scaling = {.kind = RopeScalingKind::kYarn, .factor = 32, .original_context = 4096, .truncate = false};
  }
  c.attention_bias = c.attention_output_bias = json.boolean("attention_bias", true);
  c.mlp_bias = c.attention_sinks = true;
  c.activation = Activation::kClampedSwiglu;
  LayerConfig layer = read_moe_layer(json, 128, 4, /*normalize=*/true);
  layer.expert_intermediate_size = c.layers[0].intermediate_size;
  layer.router.logit_bias = true;
  c.layers.assign(c.layers.size(), layer);
  read_windows(json, c);
  return c;
}

Json write_config(const ModelConfig& c) {
  const LayerConfig& moe = typical_moe_layer(c);
  Json json = write_family(c, kGptOssArchitecture);
  json["hidden_act"] = "silu";
  json["attention_bias"] = c.attention_bias;
  json["intermediate_size"] = moe.expert_intermediate_size;
  json["num_local_experts"] = moe.router.num_experts;
  json["num_experts_per_tok"] = moe.router.top_k;
  write_windows(c, json);
  if (json["sliding_window"].is_null()) json["sliding_window"] = 128;  // of no layer
  return json;
}

// Block (e, part) of E experts with `parts` interleaved kinds of rows: logical [E, parts * F, D].
struct Interleaved {
  int64_t experts, parts, F, D;

  std::vector<Piece> pieces(const Piece& tensor, int64_t expert_stride, int64_t row_stride, int64_t col_stride) const {
    std::vector<Piece> result;
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t part = 0; part < parts; ++part) {
        Piece& piece = result.emplace_back(tensor);
        piece.offset = (e * parts + part) * F * D;
        piece.rows = F, piece.cols = D;
        piece.first = e * expert_stride + part * row_stride;
        piece.row_stride = parts * row_stride, piece.col_stride = col_stride;
      }
    }
    return result;
  }
};

// As transformers holds them, [E, in, out], or as MXFP4 (io/mxfp4_source.h), [E, out, in]; up has gate and up rows in
// turn.
std::vector<std::vector<Piece>> expert_forms(const LogicalName& name, const TensorSpec& spec,
                                             const std::string& layer) {
  const bool up = name.module == "experts.up";
  const std::string stored = layer + "mlp.experts." + (up ? "gate_up_proj" : "down_proj");
  const int64_t parts = up ? 2 : 1, E = spec.shape[0], out = spec.shape[1];
  if (name.kind == "bias") {
    const Interleaved bias = {E, parts, out / parts, 1};
    return {bias.pieces({.stored = stored + "_bias", .stored_shape = spec.shape}, out, 1, 1)};
  }
  const int64_t in = spec.shape[2];
  const Interleaved weight = {E, parts, out / parts, in};
  return {weight.pieces({.stored = stored, .stored_shape = {E, in, out}}, in * out, 1, out),
          weight.pieces({.stored = stored + "_blocks", .stored_shape = spec.shape}, in * out, in, 1)};
}

CheckpointMap checkpoint_map(const ModelConfig& config) {
  static const std::map<std::string, std::string> kNames = {
      {"input_norm", "input_layernorm"}, {"post_attention_norm", "post_attention_layernorm"}, {"router", "mlp.router"}};
  CheckpointMap map = map_tensors(config, [](const LogicalName& name, const TensorSpec& spec) {
    using Forms = std::vector<std::vector<Piece>>;
    if (name.layer < 0) return Forms{{whole_piece(spec, spec.name)}};
    const std::string layer = "model.layers." + std::to_string(name.layer) + ".";
    if (name.module.starts_with("experts.")) return expert_forms(name, spec, layer);
    if (name.module == "attention.sinks") return Forms{{whole_piece(spec, layer + "self_attn.sinks")}};
    if (name.module.starts_with("attention.")) {
      return Forms{{whole_piece(spec, layer + "self_attn." + name.module.substr(10) + "." + name.kind)}};
    }
    const auto stored = kNames.find(name.module);
    COTERIE_CHECK(stored != kNames.end(), spec.name + " has no place in gpt-oss");
    return Forms{{whole_piece(spec, layer + stored->second + "." + name.kind)}};
  });
  map.base_prefix = "model.";
  if (config.tie_word_embeddings) map.ignored_suffixes.push_back("lm_head.weight");
  return map;
}

}  // namespace

const Architecture kGptOssArchitecture = {"GptOssForCausalLM", "gpt_oss", read_config, write_config, checkpoint_map};

}  // namespace coterie
