#include "model/checkpoint_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "coterie/error.h"
#include "io/mxfp4.h"
#include "model/architectures.h"
#include "model/test_model.h"

namespace coterie {
namespace {

// Tensors in memory, standing for a file.
class MemorySource : public TensorSource {
 public:
  void put(const std::string& name, std::vector<int64_t> shape, std::vector<float> values) {
    tensors_.push_back({name, std::move(shape), "F32", 4 * values.size()});
    values_[name] = std::move(values);
  }
  void put_mxfp4(const std::string& name, const CodedTensor& tensor, std::vector<float> decoded) {
    for (StoredTensor& t : tensors_) {
      if (t.name == name) t.dtype = "MXFP4", t.has_codes = true;
    }
    mxfp4_[name] = tensor;
    values_[name] = std::move(decoded);
  }
  std::optional<CodedTensor> codes(const std::string& name) const override {
    const auto found = mxfp4_.find(name);
    return found == mxfp4_.end() ? std::nullopt : std::optional(found->second);
  }
  void remove(const std::string& name) {
    std::erase_if(tensors_, [&](const StoredTensor& t) { return t.name == name; });
  }
  void reshape(const std::string& name, std::vector<int64_t> shape) {
    for (StoredTensor& t : tensors_) {
      if (t.name == name) t.shape = shape;
    }
  }
  const std::string& path() const override { return path_; }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  const StoredTensor* find(const std::string& name) const override {
    for (const StoredTensor& t : tensors_) {
      if (t.name == name) return &t;
    }
    return nullptr;
  }
  void read(const std::string& name, float* out) const override {
    const std::vector<float>& values = values_.at(name);
    std::copy(values.begin(), values.end(), out);
  }

 private:
  std::string path_ = "FILE";
  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::vector<float>> values_;
  std::map<std::string, CodedTensor> mxfp4_;
};

ModelConfig config_of(const std::string& json) { return ModelConfig::from_json(json, "config.json"); }

const char* kMixtral = R"({"model_type": "mixtral", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 3, "num_local_experts": 2})";
const char* kGpt2 =
    R"({"model_type": "gpt2", "vocab_size": 5, "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 6})";

// A file that has every stored tensor of the first (or last) forms, filled from random logical tensors.
struct Filled {
  std::map<std::string, std::vector<float>> logical;
  MemorySource source;

  Filled(const CheckpointMap& map, bool last_form) {
    std::map<std::string, std::vector<float>> stored;
    std::map<std::string, std::vector<int64_t>> shapes;
    uint64_t key = 0;
    for (const MappedTensor& tensor : map.tensors) {
      std::vector<float>& values = logical[tensor.spec.name] = random_values(tensor.spec.num_elements(), ++key, 1.0f);
      for (const Piece& piece : last_form ? tensor.forms.back() : tensor.forms.front()) {
        int64_t n = 1;
        for (const int64_t dim : piece.stored_shape) n *= dim;
        shapes[piece.stored] = piece.stored_shape;
        stored[piece.stored].resize(n);
        copy_to_stored(piece, values.data(), stored[piece.stored].data());
      }
    }
    for (auto& [name, values] : stored) source.put(name, shapes[name], values);
  }
};

TEST(CheckpointMap, EveryFormOfEveryArchitectureReadsBackWhatWasWritten) {
  const char* configs[] = {
      kMixtral,
      kGpt2,
      R"({"model_type": "llama", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 2,
          "intermediate_size": 3, "attention_bias": true, "mlp_bias": true})",
      R"({"model_type": "olmoe", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1,
          "intermediate_size": 3, "num_experts": 3, "num_experts_per_tok": 1})",
      R"({"model_type": "qwen2_moe", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_hidden_layers": 2, "decoder_sparse_step": 2, "intermediate_size": 3,
          "moe_intermediate_size": 2, "shared_expert_intermediate_size": 5, "num_experts": 3, "num_experts_per_tok": 1})",
      R"({"model_type": "granitemoe", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2,
          "num_hidden_layers": 1, "intermediate_size": 3, "num_local_experts": 3, "num_experts_per_tok": 1})",
      R"({"model_type": "phimoe", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1,
          "num_key_value_heads": 2, "intermediate_size": 3, "num_local_experts": 3, "lm_head_bias": true})",
      R"({"model_type": "gpt_oss", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1,
          "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 3, "num_local_experts": 3,
          "num_experts_per_tok": 1})",
      R"({"model_type": "deepseek_v3", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 3,
          "moe_intermediate_size": 2, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 2, "topk_group": 1,
          "kv_lora_rank": 3, "q_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
          "attention_bias": true})",
      R"({"model_type": "qwen3_moe", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 4, "head_dim": 2,
          "num_hidden_layers": 1, "moe_intermediate_size": 2, "num_experts": 3, "num_experts_per_tok": 1})"};
  for (const char* json : configs) {
    const ModelConfig config = config_of(json);
    const CheckpointMap map = architecture_named(config.architecture, "").checkpoint_map(config);
    for (const bool last_form : {false, true}) {
      const Filled file(map, last_form);
      const LogicalReader reader(file.source, map);
      for (const auto& [name, values] : file.logical)
        EXPECT_EQ(reader.read(name), values) << config.architecture << name;
    }
  }
}

// The oracle is the definition: element by element for the two layouts that are not plain copies.
TEST(CheckpointMap, PlacesFusedAttentionAndExperts) {
  const ModelConfig gpt2 = config_of(kGpt2);
  const Filled file(kGpt2Architecture.checkpoint_map(gpt2), false);
  std::vector<float> fused(4 * 12);
  file.source.read("transformer.h.0.attn.c_attn.weight", fused.data());
  const std::vector<float>& v = file.logical.at("model.layers.0.attention.v_proj.weight");
  for (int64_t out = 0; out < 4; ++out) {
    for (int64_t in = 0; in < 4; ++in) EXPECT_EQ(fused[in * 12 + 8 + out], v[out * 4 + in]);
  }

  const Filled experts(kMixtralArchitecture.checkpoint_map(config_of(kMixtral)), false);
  std::vector<float> w3(3 * 4);
  experts.source.read("model.layers.0.block_sparse_moe.experts.1.w3.weight", w3.data());
  const std::vector<float>& up = experts.logical.at("model.layers.0.experts.up.weight");  // [2, 6, 4]
  for (int64_t i = 0; i < 12; ++i) EXPECT_EQ(w3[i], up[1 * 24 + 12 + i]);
}

// gpt-oss's gate and up rows alternate; their 4 bits come out in the order of the logical tensor, also where the map
// has the pieces in another one, as that of GGUF files has: all gates, then all ups.
TEST(CheckpointMap, FourBitsComeOutInLogicalOrder) {
  const ModelConfig config = config_of(
      R"({"model_type": "gpt_oss", "vocab_size": 5, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1,
          "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 32, "num_local_experts": 2,
          "num_experts_per_tok": 1})");
  Filled file(kGptOssArchitecture.checkpoint_map(config), /*last_form=*/true);
  const std::string blocks = "model.layers.0.mlp.experts.gate_up_proj_blocks";
  CodedTensor stored{.rows = 2 * 64, .cols = 64};
  std::mt19937 random(3);
  for (int64_t i = 0; i < 2 * 64 * 32; ++i) stored.codes.push_back(static_cast<uint8_t>(random()));
  for (int64_t i = 0; i < 2 * 64 * 2; ++i) stored.scales.push_back(static_cast<uint8_t>(120 + random() % 10));
  std::vector<float> decoded(2 * 64 * 64);
  decode_mxfp4(std::as_bytes(std::span(stored.codes)), std::as_bytes(std::span(stored.scales)), decoded.data());
  file.source.put_mxfp4(blocks, stored, decoded);

  const std::string up = "model.layers.0.experts.up.weight";
  for (const bool gates_first : {false, true}) {
    CheckpointMap map = kGptOssArchitecture.checkpoint_map(config);
    for (MappedTensor& tensor : map.tensors) {
      const auto is_gate = [](const Piece& piece) { return piece.first / piece.cols % 2 == 0; };
      if (gates_first && tensor.spec.name == up) std::ranges::stable_partition(tensor.forms.back(), is_gate);
    }
    const LogicalReader reader(file.source, map);
    const std::optional<CodedTensor> logical = reader.read_codes(up);
    ASSERT_TRUE(logical) << gates_first;
    EXPECT_EQ(logical->rows, 2 * 64);
    EXPECT_EQ(logical->cols, 64);
    std::vector<float> values(2 * 64 * 64);
    decode_mxfp4(std::as_bytes(std::span(logical->codes)), std::as_bytes(std::span(logical->scales)), values.data());
    EXPECT_EQ(values, reader.read(up));
    // Row 3 of expert 1's up matrix is row 7 of what lies there.
    EXPECT_TRUE(std::equal(values.begin() + (64 + 32 + 3) * 64, values.begin() + (64 + 32 + 4) * 64,
                           decoded.begin() + (64 + 7) * 64));
    EXPECT_FALSE(reader.read_codes("model.norm.weight"));
  }
}

TEST(CheckpointMap, ReadsFilesOfTheBareModel) {
  const CheckpointMap map = kGpt2Architecture.checkpoint_map(config_of(kGpt2));
  const Filled file(map, false);
  MemorySource bare;
  for (const StoredTensor& tensor : file.source.tensors()) {
    std::vector<float> values(tensor.num_elements());
    file.source.read(tensor.name, values.data());
    bare.put(tensor.name.substr(std::string("transformer.").size()), tensor.shape, values);
  }
  bare.put("h.0.attn.bias", {1, 1, 6, 6}, std::vector<float>(36));  // the causal mask of older files
  const LogicalReader reader(bare, map);
  for (const auto& [name, values] : file.logical) EXPECT_EQ(reader.read(name), values) << name;
}

TEST(CheckpointMap, RefusesMissingSurplusAndWronglyShapedTensors) {
  const CheckpointMap map = kMixtralArchitecture.checkpoint_map(config_of(kMixtral));
  const auto refusal = [&](const auto& change) {
    Filled file(map, false);
    change(file.source);
    try {
      LogicalReader reader(file.source, map);
    } catch (const CorruptFile& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal([](MemorySource&) {}), "accepted");
  EXPECT_EQ(refusal([](MemorySource& f) { f.put("model.layers.0.self_attn.rotary_emb.inv_freq", {1}, {1.0f}); }),
            "accepted");
  EXPECT_EQ(refusal([](MemorySource& f) { f.remove("model.layers.0.block_sparse_moe.experts.1.w2.weight"); }),
            "FILE: model.layers.0.block_sparse_moe.experts.1.w2.weight: missing");
  EXPECT_EQ(refusal([](MemorySource& f) { f.reshape("model.norm.weight", {2, 2}); }),
            "FILE: model.norm.weight: shape [2, 2] is not [4]");
  EXPECT_EQ(refusal([](MemorySource& f) { f.put("model.layers.1.input_layernorm.weight", {4}, {1, 1, 1, 1}); }),
            "FILE: 'model.layers.1.input_layernorm.weight': not a tensor of this model");
}

}  // namespace
}  // namespace coterie
