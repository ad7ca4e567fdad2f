#include "model/weights.h"

#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "model/quantized_source.h"

namespace coterie {
namespace {

// Something that is made when it is first asked for, if anybody asks: whole tensors are, out of files.
template <typename Value>
class Lazy {
 public:
  explicit Lazy(std::function<Value()> make) : make_(std::move(make)) {}
  const Value& get() {
    if (!value_) value_ = make_();
    return *value_;
  }

 private:
  std::function<Value()> make_;
  std::optional<Value> value_;
};

// The codes of a tensor, as panels of one type are packed from them.
class StoredCodes {
 public:
  StoredCodes(CodedTensor tensor, PanelType type) : tensor_(std::move(tensor)), type_(type) {
    if (type == PanelType::kMxfp4) reordered_ = from_mxfp4(tensor_);
  }
  QuantizedView view() const { return reordered_ ? reordered_->view() : view_of_codes(tensor_, type_); }

 private:
  CodedTensor tensor_;
  PanelType type_;
  std::optional<QuantizedMatrix> reordered_;
};

// Row-major fp32 values of a matrix with any strides.
std::vector<float> contiguous(const ConstMatrix& fp32) {
  const auto* data = static_cast<const float*>(fp32.data);
  std::vector<float> values(static_cast<size_t>(fp32.rows * fp32.cols));
  for (int64_t r = 0; r < fp32.rows; ++r) {
    for (int64_t c = 0; c < fp32.cols; ++c) {
      values[r * fp32.cols + c] = data[r * fp32.row_stride + c * fp32.col_stride];
    }
  }
  return values;
}

// Of the panels of a tensor. What lies in MXFP4 stays so: fewer bits would lose something, and more would be no better.
PanelType panels_of(const LogicalReader& reader, const std::string& name, PanelType wanted) {
  const bool mxfp4 = wanted != PanelType::kF32 && reader.codes_type(name) == codes_name(PanelType::kMxfp4);
  return mxfp4 ? PanelType::kMxfp4 : wanted;
}

class WeightLoader {
 public:
  WeightLoader(const ModelConfig& config, const LogicalReader& reader, const WeightTypes& types, WeightStore& store,
               ThreadPool& pool)
      : config_(config), reader_(reader), types_(types), store_(store), pool_(pool) {}

  ModelWeights load() const {
    const int64_t V = config_.vocab_size, D = config_.hidden_size;
    const std::string embedding_name = "model.embed_tokens.weight";
    ModelWeights w;
    const bool tied = config_.tie_word_embeddings;
    if (!tied) {
      Rows embedding = rows(embedding_name, types_.head);
      w.embedding_VD = packed(embedding_name, embedding, 0, {types_.head, V, D});
    }
    w.positions_PD = read_if_there("model.embed_positions.weight");
    for (int64_t n = 0; n < config_.num_layers(); ++n) w.layers.push_back(layer(n));
    w.norm = norm("model.norm");
    Rows head = rows(tied ? embedding_name : "lm_head.weight", types_.head);
    w.head = {packed("lm_head.weight", head, 0, {types_.head, V, D}), read_if_there("lm_head.bias")};
    return w;
  }

 private:
  using Tensor = Lazy<std::vector<float>>;
  // A tensor of the file to pack rows of: from its codes where `coded`, else from its values.
  struct Rows {
    PanelType type;  // of the panels
    bool coded;
    Lazy<StoredCodes> codes;
    Tensor values;
  };

  std::vector<float> read(const std::string& name) const { return reader_.read(name); }
  std::vector<float> read_if_there(const std::string& name) const {
    return reader_.has(name) ? reader_.read(name) : std::vector<float>();
  }
  Tensor tensor(const std::string& name) const {
    return Tensor([this, name] { return read(name); });
  }
  NormWeights norm(const std::string& name) const { return {read(name + ".weight"), read_if_there(name + ".bias")}; }

  // The matrix under this name of the store, its panels filled by `fill` unless they are there. Compact where they can
  // be: under a name of their own, which tells a later start.
  PackedMatrix stored(const std::string& name, const PackedShape& shape,
                      const std::function<void(AlignedBuffer)>& fill) const {
    PackedShape compact = shape;
    compact.compact = shape.type == PanelType::kBF16;
    const std::string compact_name = name + ".compact";
    if (!compact.compact || store_.has(name)) return {shape, store_.block(name, shape.bytes(), fill)};
    if (store_.has(compact_name)) return {compact, store_.block(compact_name, compact.bytes(), fill)};
    if (!active_kernels().compact_pays) return {shape, store_.block(name, shape.bytes(), fill)};
    AlignedBuffer panels(shape.bytes());
    fill(AlignedBuffer::borrowed(panels.data(), panels.size()));
    const PackedMatrix plain(shape, std::move(panels));
    const std::optional<PackedMatrix> smaller = plain.compacted(pool_);
    const PackedMatrix& best = smaller ? *smaller : plain;
    return {best.shape(), store_.block(smaller ? compact_name : name, best.bytes(), [&](AlignedBuffer memory) {
              std::memcpy(memory.data(), best.data(), best.bytes());
            })};
  }

  // values() gives the elements as an fp32 matrix, of any strides.
  template <typename Values>
  PackedMatrix matrix(const std::string& name, const PackedShape& shape, const Values& values) const {
    return stored(name, shape, [&](AlignedBuffer memory) { pack(values(), shape, std::move(memory)); });
  }

  void pack(const ConstMatrix& fp32, const PackedShape& shape, AlignedBuffer memory) const {
    if (!is_quantized(shape.type)) {
      PackedMatrix(shape, fp32, pool_, std::move(memory));
    } else if (fp32.col_stride == 1) {
      PackedMatrix(QuantizedMatrix(fp32, shape.type, pool_).view(), pool_, shape.gated, std::move(memory));
    } else {
      pack(row_major(contiguous(fp32).data(), fp32.rows, fp32.cols), shape, std::move(memory));
    }
  }

  Rows rows(const std::string& name, PanelType wanted) const {
    const PanelType type = panels_of(reader_, name, wanted);
    const auto read_codes = [this, name, type] {
      std::optional<CodedTensor> codes = reader_.read_codes(name);
      COTERIE_CHECK(codes, name + " does not lie in whole rows");
      return StoredCodes(std::move(*codes), type);
    };
    return {type, reader_.codes_type(name) == codes_name(type), Lazy<StoredCodes>(read_codes), tensor(name)};
  }

  // Rows [first, first + shape.rows) under this name of the store. The type is that of the rows.
  PackedMatrix packed(const std::string& name, Rows& rows, int64_t first, PackedShape shape) const {
    shape.type = rows.type;
    return stored(name, shape, [&](AlignedBuffer memory) {
      if (rows.coded) {
        const QuantizedView part = rows.codes.get().view().row_range(first, shape.rows);
        PackedMatrix(part, pool_, shape.gated, std::move(memory));
      } else {
        const float* values = rows.values.get().data() + first * shape.cols;
        pack(row_major(values, shape.rows, shape.cols), shape, std::move(memory));
      }
    });
  }

  LinearWeights linear(const std::string& name, PanelType type, int64_t num_rows, int64_t cols) const {
    Rows weight = rows(name + ".weight", type);
    return {packed(name + ".weight", weight, 0, {type, num_rows, cols}), read_if_there(name + ".bias")};
  }
  LinearWeights projection(const std::string& name, int64_t rows, int64_t cols) const {
    return linear(name, types_.attention, rows, cols);
  }

  LatentWeights latent(const std::string& name) const {
    const LatentAttention& l = config_.latent;
    const int64_t D = config_.hidden_size, H = config_.num_heads, head = l.nope_dim + l.v_dim;
    LatentWeights w;
    if (l.q_rank > 0) {
      w.q_a = projection(name + "q_a_proj", l.q_rank, D);
      w.q_a_norm = read(name + "q_a_norm.weight");
      w.q_b = projection(name + "q_b_proj", H * config_.head_dim, l.q_rank);
    }
    w.kv_a = projection(name + "kv_a_proj", l.kv_rank + l.rope_dim, D);
    w.kv_a_norm = read(name + "kv_a_norm.weight");
    Tensor kv_b = tensor(name + "kv_b_proj.weight");
    for (int64_t h = 0; h < H; ++h) {
      const auto rows = [&](int64_t first, int64_t count) {
        return row_major(kv_b.get().data(), H * head, l.kv_rank).row_range(h * head + first, count);
      };
      const std::string of_head = name + "kv_b_proj.weight." + std::to_string(h);
      w.key_up_H.push_back(matrix(of_head + ".keys", {types_.attention, l.kv_rank, l.nope_dim},
                                  [&] { return rows(0, l.nope_dim).transposed(); }));
      w.value_up_H.push_back(matrix(of_head + ".values", {types_.attention, l.v_dim, l.kv_rank},
                                    [&] { return rows(l.nope_dim, l.v_dim); }));
    }
    return w;
  }

  void attention(const std::string& name, LayerWeights& w) const {
    const int64_t D = config_.hidden_size, d = config_.head_dim;
    if (config_.is_latent()) w.latent = latent(name);
    if (config_.latent.q_rank == 0) w.q = projection(name + "q_proj", config_.num_heads * d, D);
    if (!config_.is_latent()) {
      w.k = projection(name + "k_proj", config_.num_kv_heads * d, D);
      w.v = projection(name + "v_proj", config_.num_kv_heads * d, D);
    }
    w.q_norm = read_if_there(name + "q_norm.weight");
    w.k_norm = read_if_there(name + "k_norm.weight");
    w.sinks_H = read_if_there(name + "sinks.weight");
    w.attention_output = projection(name + "o_proj", D, config_.attention_width());
  }

  // One matrix of every expert; shape is that of one.
  std::vector<PackedMatrix> matrices_of_experts(const std::string& name, int64_t E, const PackedShape& shape) const {
    Rows all = rows(name, shape.type);
    std::vector<PackedMatrix> result;
    for (int64_t e = 0; e < E; ++e)
      result.push_back(packed(name + "." + std::to_string(e), all, e * shape.rows, shape));
    return result;
  }

  PackedExperts experts(const std::string& name, int64_t num_experts, int64_t inner) const {
    PackedExperts e;
    e.shape = {.num_experts = num_experts,
               .hidden_size = config_.hidden_size,
               .intermediate_size = inner,
               .activation = config_.activation,
               .gated = config_.gated_mlp};
    const PackedShape up = {types_.experts, e.shape.up_rows(), config_.hidden_size, e.shape.gated};
    e.up_E = matrices_of_experts(name + ".up.weight", num_experts, up);
    e.down_E = matrices_of_experts(name + ".down.weight", num_experts, {types_.experts, config_.hidden_size, inner});
    e.up_bias_EU = read_if_there(name + ".up.bias");
    e.down_bias_ED = read_if_there(name + ".down.bias");
    return e;
  }

  LayerWeights layer(int64_t n) const {
    const std::string name = "model.layers." + std::to_string(n) + ".";
    const LayerConfig& l = config_.layers[n];
    const int64_t D = config_.hidden_size;
    LayerWeights w;
    w.input_norm = norm(name + "input_norm");
    attention(name + "attention.", w);
    w.post_attention_norm = norm(name + "post_attention_norm");
    if (l.intermediate_size > 0) w.mlp = experts(name + "mlp", 1, l.intermediate_size);
    if (!l.is_moe()) return w;
    w.router = linear(name + "router", PanelType::kF32, l.router.num_experts, D);
    w.choice_bias_E = read_if_there(name + "router.choice_bias");
    w.experts = experts(name + "experts", l.router.num_experts, l.expert_intermediate_size);
    if (l.residual == ResidualKind::kLearned) w.mix = linear(name + "mix", PanelType::kF32, 2, D);
    if (l.residual == ResidualKind::kSharedGate) w.mix = linear(name + "mix", PanelType::kF32, 1, D);
    return w;
  }

  const ModelConfig& config_;
  const LogicalReader& reader_;
  const WeightTypes& types_;
  WeightStore& store_;
  ThreadPool& pool_;
};

}  // namespace

void visit_matrices(ModelWeights& weights, const std::function<void(PackedMatrix&)>& visit) {
  for (LayerWeights& w : weights.layers) {
    for (LinearWeights* linear :
         {&w.q, &w.k, &w.v, &w.attention_output, &w.latent.q_a, &w.latent.q_b, &w.latent.kv_a, &w.router, &w.mix}) {
      visit(linear->weight_NK);
    }
    for (auto* matrices :
         {&w.latent.key_up_H, &w.latent.value_up_H, &w.mlp.up_E, &w.mlp.down_E, &w.experts.up_E, &w.experts.down_E}) {
      for (PackedMatrix& matrix : *matrices) visit(matrix);
    }
  }
  visit(weights.embedding_VD);
  visit(weights.head.weight_NK);
}

int64_t packed_bytes(const ModelConfig& config, const LogicalReader& reader, const WeightTypes& types) {
  size_t bytes = 0;
  for (const TensorSpec& tensor : logical_tensors(config)) {
    if (tensor.shape.size() < 2) continue;
    const PanelType type = panels_of(reader, tensor.name, type_of_tensor(types, tensor.name));
    const int64_t cols = tensor.shape.back();
    const bool compact = type == PanelType::kBF16 && active_kernels().compact_pays;
    bytes += PackedShape{type, tensor.num_elements() / cols, cols, false, compact}.bytes();
  }
  return static_cast<int64_t>(bytes);
}

ModelWeights load_weights(const ModelConfig& config, const LogicalReader& reader, const WeightTypes& types,
                          ThreadPool& pool, const WeightCache& cache) {
  const auto load = [&](WeightStore& store) { return WeightLoader(config, reader, types, store, pool).load(); };
  std::unique_ptr<WeightStore> store;
  if (!cache.path.empty()) store = cached_weights(cache, load, pool);
  if (!store) store = std::make_unique<MemoryStore>();
  ModelWeights weights = load(*store);
  weights.store = std::move(store);
  return weights;
}

}  // namespace coterie
