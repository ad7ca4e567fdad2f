// map_of_gguf: the tensors of a GGUF file as pieces of logical ones.
#include <map>

#include "base/check.h"
#include "model/gguf_metadata.h"
#include "model/gguf_model.h"

namespace coterie {
namespace {

using Forms = std::vector<std::vector<Piece>>;

// Whose q and k rows the converter has turned.
bool has_turned_heads(const GgufSource& file) {
  const std::string architecture = GgufMetadata(file, "general").text("architecture").value_or("");
  return architecture == "llama" || architecture == "granitemoe";
}

class GgufMap {
 public:
  GgufMap(const GgufSource& file, const ModelConfig& config)
      : file_(file), config_(config), turned_(has_turned_heads(file)) {}

  Forms forms(const LogicalName& name, const TensorSpec& spec) const {
    static const std::map<std::string, std::string> kTop = {
        {"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}};
    if (name.layer < 0) return {{whole_piece(spec, kTop.at(name.module) + "." + name.kind)}};
    const std::string layer = "blk." + std::to_string(name.layer) + ".";
    const std::string& module = name.module;
    if (module == "attention.q_proj") return heads(spec, layer + "attn_q." + name.kind, config_.num_heads);
    if (module == "attention.k_proj") return heads(spec, layer + "attn_k." + name.kind, config_.num_kv_heads);
    if (module == "attention.kv_b_proj")
      return {{whole_piece(spec, layer + "attn_kv_b.weight")}, split_kv_b(spec, layer)};
    if (module == "mix") return mix(spec, layer + "ffn_gate_inp_shexp.weight");
    if (module == "router" && name.kind == "choice_bias") return {{whole_piece(spec, layer + "exp_probs_b.bias")}};
    if (module == "experts.up") return {gate_and_up(spec, layer, "_exps." + name.kind)};
    if (module == "experts.down") return {{whole_piece(spec, layer + "ffn_down_exps." + name.kind)}};
    const std::string shared = config_.layers[name.layer].is_moe() ? "_shexp." : ".";
    if (module == "mlp.up") return {gate_and_up(spec, layer, shared + name.kind)};
    if (module == "mlp.down") return {{whole_piece(spec, layer + "ffn_down" + shared + name.kind)}};
    if (module == "post_attention_norm") {
      return {{whole_piece(spec, layer + "ffn_norm." + name.kind)},
              {whole_piece(spec, layer + "post_attention_norm." + name.kind)}};
    }
    return {{whole_piece(spec, layer + stored_module(module) + "." + name.kind)}};
  }

 private:
  static const std::string& stored_module(const std::string& module) {
    static const std::map<std::string, std::string> kNames = {
        {"input_norm", "attn_norm"},
        {"attention.v_proj", "attn_v"},
        {"attention.o_proj", "attn_output"},
        {"attention.q_norm", "attn_q_norm"},
        {"attention.k_norm", "attn_k_norm"},
        {"attention.sinks", "attn_sinks"},
        {"attention.q_a_proj", "attn_q_a"},
        {"attention.q_a_norm", "attn_q_a_norm"},
        {"attention.q_b_proj", "attn_q_b"},
        {"attention.kv_a_proj", "attn_kv_a_mqa"},
        {"attention.kv_a_norm", "attn_kv_a_norm"},
        {"router", "ffn_gate_inp"},
    };
    const auto found = kNames.find(module);
    COTERIE_CHECK(found != kNames.end(), module + " has no place in a GGUF file");
    return found->second;
  }

  // Row 2 i + s of a turned head is row i of its half s.
  Forms heads(const TensorSpec& spec, const std::string& stored, int64_t num_heads) const {
    Piece whole = whole_piece(spec, stored);
    if (!turned_) return {{whole}};
    const int64_t half = config_.head_dim / 2, cols = whole.cols;
    std::vector<Piece> pieces;
    for (int64_t h = 0; h < 2 * num_heads; ++h) {
      Piece& piece = pieces.emplace_back(whole);
      piece.offset = h * half * cols;
      piece.rows = half;
      piece.first = (h / 2 * config_.head_dim + h % 2) * cols;
      piece.row_stride = 2 * cols;
    }
    return {pieces};
  }

  // Two matrices (of each expert) become one, gate rows first. All gates, then all ups: each file tensor is read once.
  static std::vector<Piece> gate_and_up(const TensorSpec& spec, const std::string& layer, const std::string& suffix) {
    const bool is_weight = suffix.ends_with("weight");
    const size_t row_axis = spec.shape.size() - (is_weight ? 2 : 1);
    const int64_t experts = row_axis > 0 ? spec.shape[0] : 1, rows = spec.shape[row_axis] / 2;
    const int64_t cols = is_weight ? spec.shape.back() : 1;
    std::vector<int64_t> shape = spec.shape;
    shape[row_axis] = rows;
    std::vector<Piece> pieces;
    for (int64_t part = 0; part < 2; ++part) {
      for (int64_t e = 0; e < experts; ++e) {
        pieces.push_back({.stored = layer + (part == 0 ? "ffn_gate" : "ffn_up") + suffix,
                          .stored_shape = shape,
                          .offset = (2 * e + part) * rows * cols,
                          .rows = rows,
                          .cols = cols,
                          .first = e * rows * cols,
                          .row_stride = cols});
      }
    }
    return pieces;
  }

  // Newer files have the two halves of each head apart, the keys' transposed: [H, R, n] and [H, v, R].
  std::vector<Piece> split_kv_b(const TensorSpec& spec, const std::string& layer) const {
    const LatentAttention& l = config_.latent;
    const int64_t H = config_.num_heads, R = l.kv_rank, n = l.nope_dim, v = l.v_dim;
    std::vector<Piece> pieces;
    for (int64_t h = 0; h < H; ++h) {
      pieces.push_back({.stored = layer + "attn_k_b.weight",
                        .stored_shape = {H, R, n},
                        .offset = h * (n + v) * R,
                        .rows = n,
                        .cols = R,
                        .first = h * R * n,
                        .row_stride = 1,
                        .col_stride = n});
    }
    for (int64_t h = 0; h < H; ++h) {
      pieces.push_back({.stored = layer + "attn_v_b.weight",
                        .stored_shape = {H, v, R},
                        .offset = (h * (n + v) + n) * R,
                        .rows = v,
                        .cols = R,
                        .first = h * v * R,
                        .row_stride = R});
    }
    COTERIE_CHECK(spec.num_elements() == H * (n + v) * R, "kv_b has another shape");
    return pieces;
  }

  // A row vector, with or without its axis of length 1.
  Forms mix(const TensorSpec& spec, const std::string& stored) const {
    Piece piece = whole_piece(spec, stored);
    const StoredTensor* tensor = file_.find(stored);
    if (tensor && tensor->shape.size() == 1) piece.stored_shape = {spec.num_elements()};
    return {{piece}};
  }

  const GgufSource& file_;
  const ModelConfig& config_;
  bool turned_;
};

}  // namespace

CheckpointMap map_of_gguf(const GgufSource& file, const ModelConfig& config) {
  const GgufMap names(file, config);
  CheckpointMap map =
      map_tensors(config, [&](const LogicalName& name, const TensorSpec& spec) { return names.forms(name, spec); });
  map.first_ignored_layer = config.num_layers();
  map.layer_prefix = "blk.";
  // Read with the configuration.
  map.ignored_suffixes = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"};
  return map;
}

}  // namespace coterie
