#include "model/weights.h"

#include <string>
#include <utility>

namespace coterie {
namespace {

class WeightLoader {
 public:
  WeightLoader(const ModelConfig& config, const LogicalReader& reader, DType dtype, ThreadPool& pool)
      : config_(config), reader_(reader), dtype_(dtype), pool_(pool) {}

  std::vector<float> read(const std::string& name) const { return reader_.read(name); }
  std::vector<float> read_if_there(const std::string& name) const {
    return reader_.has(name) ? reader_.read(name) : std::vector<float>();
  }
  NormWeights norm(const std::string& name) const { return {read(name + ".weight"), read_if_there(name + ".bias")}; }

  // Values in the dtype of the matrices; fp32 keeps the vector itself.
  AlignedBuffer converted(const std::vector<float>& values) const {
    AlignedBuffer buffer(values.size() * dtype_size(dtype_));
    convert_from_float(values.data(), dtype_, buffer.data(), values.size());
    return buffer;
  }

  PackedMatrix pack(const std::vector<float>& values, int64_t rows) const {
    const auto cols = static_cast<int64_t>(values.size()) / rows;
    if (dtype_ == DType::kF32) return pack_fp32(values, rows);
    const AlignedBuffer buffer = converted(values);
    return PackedMatrix(row_major(buffer.data(), dtype_, rows, cols), pool_);
  }
  // A block of a matrix of fp32 values, whatever its strides.
  PackedMatrix pack(const ConstMatrix& fp32) const {
    const auto* data = static_cast<const float*>(fp32.data);
    std::vector<float> values(fp32.rows * fp32.cols);
    for (int64_t r = 0; r < fp32.rows; ++r) {
      for (int64_t c = 0; c < fp32.cols; ++c) {
        values[r * fp32.cols + c] = data[r * fp32.row_stride + c * fp32.col_stride];
      }
    }
    return pack(values, fp32.rows);
  }
  PackedMatrix pack_fp32(const std::vector<float>& values, int64_t rows) const {
    return PackedMatrix(row_major(values.data(), rows, static_cast<int64_t>(values.size()) / rows), pool_);
  }

  LinearWeights linear(const std::string& name, int64_t rows) const {
    return {pack(read(name + ".weight"), rows), read_if_there(name + ".bias")};
  }

  LatentWeights latent(const std::string& name) const {
    const LatentAttention& l = config_.latent;
    LatentWeights w;
    if (l.q_rank > 0) {
      w.q_a = linear(name + "q_a_proj", l.q_rank);
      w.q_a_norm = read(name + "q_a_norm.weight");
      w.q_b = linear(name + "q_b_proj", config_.num_heads * config_.head_dim);
    }
    w.kv_a = linear(name + "kv_a_proj", l.kv_rank + l.rope_dim);
    w.kv_a_norm = read(name + "kv_a_norm.weight");
    const std::vector<float> kv_b = read(name + "kv_b_proj.weight");
    const int64_t head = l.nope_dim + l.v_dim;
    const ConstMatrix up = row_major(kv_b.data(), config_.num_heads * head, l.kv_rank);
    for (int64_t h = 0; h < config_.num_heads; ++h) {
      w.key_up_H.push_back(pack(up.row_range(h * head, l.nope_dim).transposed()));
      w.value_up_H.push_back(pack(up.row_range(h * head + l.nope_dim, l.v_dim)));
    }
    return w;
  }

  void attention(const std::string& name, LayerWeights& w) const {
    if (config_.is_latent()) w.latent = latent(name);
    if (config_.latent.q_rank == 0) w.q = linear(name + "q_proj", config_.num_heads * config_.head_dim);
    if (!config_.is_latent()) {
      w.k = linear(name + "k_proj", config_.num_kv_heads * config_.head_dim);
      w.v = linear(name + "v_proj", config_.num_kv_heads * config_.head_dim);
    }
    w.q_norm = read_if_there(name + "q_norm.weight");
    w.k_norm = read_if_there(name + "k_norm.weight");
    w.sinks_H = read_if_there(name + "sinks.weight");
    w.attention_output = linear(name + "o_proj", config_.hidden_size);
  }

  PackedExperts experts(const std::string& name, int64_t num_experts, int64_t inner) const {
    const ExpertShape shape = {.num_experts = num_experts,
                               .hidden_size = config_.hidden_size,
                               .intermediate_size = inner,
                               .activation = config_.activation,
                               .gated = config_.gated_mlp};
    const std::vector<float> up_bias = read_if_there(name + ".up.bias"), down_bias = read_if_there(name + ".down.bias");
    const AlignedBuffer up = converted(read(name + ".up.weight")), down = converted(read(name + ".down.weight"));
    const ExpertWeights weights = {.up_EUD = up.data(),
                                   .down_EDF = down.data(),
                                   .up_bias_EU = up_bias.empty() ? nullptr : up_bias.data(),
                                   .down_bias_ED = down_bias.empty() ? nullptr : down_bias.data(),
                                   .dtype = dtype_};
    return PackedExperts(shape, weights, pool_);
  }

  LayerWeights layer(int64_t n) const {
    const std::string name = "model.layers." + std::to_string(n) + ".";
    const LayerConfig& l = config_.layers[n];
    LayerWeights w;
    w.input_norm = norm(name + "input_norm");
    attention(name + "attention.", w);
    w.post_attention_norm = norm(name + "post_attention_norm");
    if (l.intermediate_size > 0) w.mlp = experts(name + "mlp", 1, l.intermediate_size);
    if (!l.is_moe()) return w;
    w.router = {pack_fp32(read(name + "router.weight"), l.router.num_experts), read_if_there(name + "router.bias")};
    w.choice_bias_E = read_if_there(name + "router.choice_bias");
    w.experts = experts(name + "experts", l.router.num_experts, l.expert_intermediate_size);
    const std::vector<float> mix = read_if_there(name + "mix.weight");
    if (!mix.empty()) {
      w.mix = {pack_fp32(mix, static_cast<int64_t>(mix.size()) / config_.hidden_size),
               read_if_there(name + "mix.bias")};
    }
    return w;
  }

  ModelWeights load() const {
    ModelWeights w;
    w.dtype = dtype_;
    const std::vector<float> embedding = read("model.embed_tokens.weight");
    w.embedding_VD = converted(embedding);
    w.positions_PD = read_if_there("model.embed_positions.weight");
    for (int64_t n = 0; n < config_.num_layers(); ++n) w.layers.push_back(layer(n));
    w.norm = norm("model.norm");
    w.head = {pack(config_.tie_word_embeddings ? embedding : read("lm_head.weight"), config_.vocab_size),
              read_if_there("lm_head.bias")};
    return w;
  }

 private:
  const ModelConfig& config_;
  const LogicalReader& reader_;
  DType dtype_;
  ThreadPool& pool_;
};

}  // namespace

ModelWeights load_weights(const ModelConfig& config, const LogicalReader& reader, DType dtype, ThreadPool& pool) {
  return WeightLoader(config, reader, dtype, pool).load();
}

}  // namespace coterie
