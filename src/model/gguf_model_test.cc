#include "model/gguf_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "io/test_files.h"
#include "io/test_gguf.h"

namespace coterie {
namespace {

using namespace gguf_file;

// A Llama file: 2 layers, hidden 8, 2 heads of 6 and one KV head, MLP 6, vocabulary 5; every number of
// a tensor says where it lies in the file: row + column / 64.
class GgufModelTest : public TemporaryDirectoryTest {
 protected:
  using Values = std::vector<std::pair<std::string, std::string>>;  // key, whole entry

  static Values good_values() {
    const auto integer = [](const std::string& key, uint32_t v) { return std::pair(key, value(key, kUint32, v)); };
    const auto real = [](const std::string& key, float v) { return std::pair(key, value(key, kFloat32, v)); };
    return {{"general.architecture", text_value("general.architecture", "llama")},
            integer("llama.block_count", 2),
            integer("llama.context_length", 128),
            integer("llama.embedding_length", 8),
            integer("llama.feed_forward_length", 6),
            integer("llama.attention.head_count", 2),
            integer("llama.attention.head_count_kv", 1),
            integer("llama.attention.key_length", 6),
            real("llama.attention.layer_norm_rms_epsilon", 1e-6f),
            real("llama.rope.freq_base", 50000.0f),
            integer("tokenizer.ggml.bos_token_id", 1),
            integer("tokenizer.ggml.eos_token_id", 2)};
  }

  // Adds an entry, or puts it in the place of the one with that key.
  static Values with(const std::string& key, const std::string& entry) {
    Values values = good_values();
    const auto found = std::ranges::find_if(values, [&](const auto& v) { return v.first == key; });
    if (found == values.end()) {
      values.emplace_back(key, entry);
    } else {
      found->second = entry;
    }
    return values;
  }
  static Values with(const std::string& key, uint32_t v) { return with(key, value(key, kUint32, v)); }

  static Values without(const std::string& key) {
    Values values = good_values();
    std::erase_if(values, [&](const auto& v) { return v.first == key; });
    return values;
  }

  struct Tensor {
    std::string name;
    uint64_t rows, cols;  // cols 0: a vector
  };

  static std::vector<Tensor> good_tensors() {
    std::vector<Tensor> tensors = {{"token_embd.weight", 5, 8}, {"output_norm.weight", 8, 0}};
    for (const std::string layer : {"blk.0.", "blk.1."}) {
      const std::vector<Tensor> of_layer = {
          {layer + "attn_norm.weight", 8, 0}, {layer + "attn_q.weight", 12, 8},      {layer + "attn_k.weight", 6, 8},
          {layer + "attn_v.weight", 6, 8},    {layer + "attn_output.weight", 8, 12}, {layer + "ffn_norm.weight", 8, 0},
          {layer + "ffn_gate.weight", 6, 8},  {layer + "ffn_up.weight", 6, 8},       {layer + "ffn_down.weight", 8, 6}};
      tensors.insert(tensors.end(), of_layer.begin(), of_layer.end());
    }
    return tensors;
  }

  std::string write_file(const Values& values, const std::vector<Tensor>& tensors) {
    return write("a.gguf", bytes(values, tensors));
  }

  static std::string bytes(const Values& values, const std::vector<Tensor>& tensors) {
    Parts parts;
    for (const auto& [key, entry] : values) parts.values.push_back(entry);
    for (const auto& [name, rows, cols] : tensors) {
      const std::vector<uint64_t> shape = cols ? std::vector<uint64_t>{cols, rows} : std::vector<uint64_t>{rows};
      parts.tensors.push_back(tensor(name, shape, kF32, parts.data.size()));
      for (uint64_t i = 0; i < rows * std::max<uint64_t>(cols, 1); ++i) {
        const uint64_t width = std::max<uint64_t>(cols, 1);
        parts.data += le(static_cast<float>(i / width) + static_cast<float>(i % width) / 64);
      }
      parts.data.resize((parts.data.size() + 31) / 32 * 32);
    }
    return parts.bytes();
  }

  std::string refusal(const Values& values, const std::vector<Tensor>& tensors = good_tensors()) {
    const std::string path = write_file(values, tensors);
    const GgufSource file(path);
    return invalid_message([&] { config_from_gguf(file); }, path);
  }

  // The rows of a tensor of 8 columns, by the row of the file that each came from.
  static std::vector<int> file_rows(const LogicalReader& reader, const std::string& name) {
    const std::vector<float> values = reader.read(name);
    std::vector<int> rows;
    for (size_t i = 0; i < values.size(); ++i) {
      if (i % 8 == 0) rows.push_back(static_cast<int>(values[i]));
      EXPECT_EQ(values[i], static_cast<float>(rows.back()) + static_cast<float>(i % 8) / 64) << name;
    }
    return rows;
  }
};

TEST_F(GgufModelTest, MetadataBecomesAConfig) {
  const GgufSource file(write_file(good_values(), good_tensors()));
  const ModelConfig config = config_from_gguf(file);
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.vocab_size, 5);
  EXPECT_EQ(config.hidden_size, 8);
  EXPECT_EQ(config.num_heads, 2);
  EXPECT_EQ(config.num_kv_heads, 1);
  EXPECT_EQ(config.head_dim, 6);
  EXPECT_EQ(config.max_position_embeddings, 128);
  EXPECT_EQ(config.norm, NormKind::kRmsNorm);
  EXPECT_EQ(config.norm_eps, 1e-6f);
  EXPECT_EQ(config.rope_theta, 50000.0);
  EXPECT_EQ(config.num_layers(), 2);
  EXPECT_EQ(config.layers[1].intermediate_size, 6);
  EXPECT_FALSE(config.layers[1].is_moe());
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_FALSE(config.attention_bias || config.attention_output_bias || config.mlp_bias);
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{2});
}

TEST_F(GgufModelTest, WhatTheTensorsSayIsRead) {
  std::vector<Tensor> tensors = good_tensors();
  tensors.insert(tensors.end(), {{"output.weight", 5, 8}, {"blk.0.attn_q.bias", 12, 0}, {"blk.0.ffn_down.bias", 8, 0}});
  const GgufSource file(write_file(with("tokenizer.ggml.eot_token_id", 4), tensors));
  const ModelConfig config = config_from_gguf(file);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_TRUE(config.attention_bias);
  EXPECT_TRUE(config.mlp_bias);
  EXPECT_FALSE(config.attention_output_bias);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int64_t>{2, 4}));
  // A bias's rows are turned like its matrix's: within each head of 6, from 0 2 4 1 3 5.
  std::vector<Tensor> biased = good_tensors();
  for (const std::string layer : {"blk.0.", "blk.1."}) {
    biased.insert(biased.end(),
                  {{layer + "attn_q.bias", 12, 0}, {layer + "attn_k.bias", 6, 0}, {layer + "attn_v.bias", 6, 0}});
  }
  const GgufSource biased_file(write("b.gguf", bytes(good_values(), biased)));
  const ModelConfig biased_config = config_from_gguf(biased_file);
  const LogicalReader reader(biased_file, map_of_gguf(biased_file, biased_config));
  EXPECT_EQ(reader.read("model.layers.0.attention.q_proj.bias"),
            (std::vector<float>{0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11}));
}

// A list of ids or of texts.
template <typename T>
std::string list_value(const std::string& key, uint32_t type, const std::vector<T>& entries) {
  std::string out = str(key) + le(kArray) + le(type) + le(uint64_t{entries.size()});
  for (const T& entry : entries) {
    if constexpr (std::is_same_v<T, std::string>) {
      out += str(entry);
    } else {
      out += le(entry);
    }
  }
  return out;
}

TEST_F(GgufModelTest, EndTokensAreThoseOfTheMetadataAndThoseKnownByTheirText) {
  const auto ends = [&](const std::vector<std::string>& entries) {
    Values values = good_values();
    for (const std::string& entry : entries) values.emplace_back("", entry);
    return config_from_gguf(GgufSource(write_file(values, good_tensors()))).eos_token_ids;
  };
  using Texts = std::vector<std::string>;
  const auto vocabulary = [&](const Texts& texts, const std::vector<int32_t>& types) {
    return ends(
        {list_value("tokenizer.ggml.tokens", kString, texts), list_value("tokenizer.ggml.token_type", kInt32, types)});
  };
  using Ids = std::vector<int64_t>;
  EXPECT_EQ(ends({value("tokenizer.ggml.eom_token_id", kUint32, 3u), value("tokenizer.ggml.eot_token_id", kUint32, 4u),
                  list_value<uint32_t>("tokenizer.ggml.eos_token_ids", kUint32, {2, 1, 4})}),
            (Ids{2, 4, 3, 1}));
  EXPECT_EQ(vocabulary({"<|im_end|>", "<|endoftext|>", "</s>", "a", "<|eot_id|>"}, {3, 3, 3, 1, 3}), (Ids{2, 0, 1, 4}));
  EXPECT_EQ(vocabulary({"<|im_end|>", "<|end|>", "</s>", "<|eot_id|>"}, {1, 3, 3, 4}), (Ids{2, 0, 1, 3}))
      << "whatever their type";
  EXPECT_EQ(vocabulary({"<|return|>", "<|end|>", "<|endoftext|>", "<|call|>"}, {3, 3, 3, 3}), (Ids{2, 0, 3}))
      << "of gpt-oss";
  EXPECT_EQ(vocabulary({"<\xef\xbd\x9c"
                        "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>"},
                       {3}),
            (Ids{2, 0}));
  EXPECT_EQ(ends({list_value("tokenizer.ggml.tokens", kString, Texts{"<|im_end|>", "a", "b", "<end_of_turn>"})}),
            (Ids{2, 0, 3}))
      << "no types";
  EXPECT_EQ(refusal(with("tokenizer.ggml.eos_token_ids", 3)),
            ": tokenizer.ggml.eos_token_ids: is not a list of whole numbers");
}

// llama.cpp's number for no token is -1, which some files have as an unsigned one.
TEST_F(GgufModelTest, ATokenThatTheFileSaysItLacksIsNone) {
  const auto config_with = [&](const std::string& key, const std::string& entry) {
    return config_from_gguf(GgufSource(write_file(with(key, entry), good_tensors())));
  };
  using Ids = std::vector<int64_t>;
  const std::string ggml = "tokenizer.ggml.";
  for (const std::string key : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
    const Ids ids = key == "eos_token_id" ? Ids{} : Ids{2};
    EXPECT_EQ(config_with(ggml + key, value(ggml + key, kInt32, -1)).eos_token_ids, ids) << key;
    EXPECT_EQ(config_with(ggml + key, value(ggml + key, kUint32, ~0u)).eos_token_ids, ids) << key;
    EXPECT_EQ(refusal(with(ggml + key, value(ggml + key, kInt32, -2))), ": " + ggml + key + ": -2 is no token");
  }
  const std::string list = ggml + "eos_token_ids", bos = ggml + "bos_token_id";
  EXPECT_EQ(config_with(list, list_value<int32_t>(list, kInt32, {4, -1})).eos_token_ids, (Ids{2, 4}));
  EXPECT_EQ(refusal(with(list, list_value<int32_t>(list, kInt32, {4, -3}))), ": " + list + ": -3 is no token");
  EXPECT_EQ(config_with(bos, value(bos, kUint32, ~0u)).bos_token_id, -1);
  EXPECT_EQ(refusal(with(bos, value(bos, kInt32, -2))), ": " + bos + ": -2 is no token");
}

TEST_F(GgufModelTest, TensorsLieUnderTheirLogicalNamesWithQueryAndKeyRowsTurnedBack) {
  const GgufSource file(write_file(good_values(), good_tensors()));
  const ModelConfig config = config_from_gguf(file);
  const LogicalReader reader(file, map_of_gguf(file, config));
  EXPECT_EQ(file_rows(reader, "model.layers.1.attention.q_proj.weight"),
            (std::vector<int>{0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11}));
  EXPECT_EQ(file_rows(reader, "model.layers.1.attention.k_proj.weight"), (std::vector<int>{0, 2, 4, 1, 3, 5}));
  EXPECT_EQ(file_rows(reader, "model.layers.1.attention.v_proj.weight"), (std::vector<int>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(file_rows(reader, "model.layers.0.mlp.up.weight"), (std::vector<int>{0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(file_rows(reader, "model.embed_tokens.weight"), (std::vector<int>{0, 1, 2, 3, 4}));
  EXPECT_EQ(reader.read("model.norm.weight"), (std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST_F(GgufModelTest, FactorsByLengthAreRead) {
  Values values = with("llama.rope.scaling.original_context_length", 32);
  values.emplace_back("", value("llama.rope.scaling.attn_factor", kFloat32, 1.25f));
  std::vector<Tensor> tensors = good_tensors();
  tensors.push_back({"rope_factors_short.weight", 3, 0});
  EXPECT_EQ(refusal(values, tensors), ": rope_factors_long.weight: is missing");
  tensors.push_back({"rope_factors_long.weight", 2, 0});
  EXPECT_EQ(refusal(values, tensors), ": rope_factors_long.weight: 2 factors, not 3");
  tensors.back().rows = 3;
  EXPECT_EQ(refusal(values, tensors), ": rope_scaling.short_factor: 0.0 is not positive");  // what the test writes
  const std::string multiplier = "llama.rope.scaling.yarn_log_multiplier", by_length = "rope_factors_long.weight";
  values.emplace_back("", value(multiplier, kFloat32, 0.5f));
  EXPECT_EQ(refusal(values, tensors), ": " + multiplier + ": 0.500000 does not go with " + by_length);
  values.pop_back();
  tensors.push_back({"rope_freqs.weight", 3, 0});
  EXPECT_EQ(refusal(values, tensors), ": rope_freqs.weight: does not go with " + by_length);
  tensors.pop_back();
  values.emplace_back("", text_value("llama.rope.scaling.type", "yarn"));
  EXPECT_EQ(refusal(values, tensors), ": llama.rope.scaling.type: 'yarn' does not go with rope_factors_long.weight");
}

TEST_F(GgufModelTest, ScalingThatIsNoNumberIsRefusedByKey) {
  const std::string scaling = "llama.rope.scaling.";
  const auto refusal_of = [&](const std::string& type, const std::vector<std::pair<std::string, float>>& numbers) {
    Values values = with(scaling + "type", text_value(scaling + "type", type));
    for (const auto& [key, number] : numbers) values.emplace_back("", value(scaling + key, kFloat32, number));
    return refusal(values);
  };
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(refusal_of("linear", {{"factor", nan}}), ": " + scaling + "factor: nan is not finite");
  EXPECT_EQ(refusal_of("yarn", {{"factor", inf}}), ": " + scaling + "factor: inf is not finite");
  EXPECT_EQ(refusal_of("yarn", {{"factor", 2}, {"yarn_beta_fast", nan}}),
            ": " + scaling + "yarn_beta_fast: nan is not finite");
  EXPECT_EQ(refusal_of("yarn", {{"factor", 2}, {"yarn_beta_slow", -1}}),
            ": rope_scaling.beta_slow: -1.0 is not positive");
  EXPECT_EQ(refusal_of("yarn", {{"factor", 2}, {"yarn_log_multiplier", -inf}}),
            ": " + scaling + "yarn_log_multiplier: -inf is not finite");
  EXPECT_EQ(refusal_of("linear", {{"factor", 2}, {"yarn_log_multiplier", 0.5}}),
            ": " + scaling + "yarn_log_multiplier: 0.500000 does not go with rope.scaling.type 'linear'");
  EXPECT_EQ(refusal_of("yarn", {{"factor", 2}, {"yarn_beta_fast", 16}, {"yarn_log_multiplier", 0.1f}}), "");
  Values values = with(scaling + "type", text_value(scaling + "type", "yarn"));
  values.emplace_back("", value(scaling + "original_context_length", kUint32, 0u));
  EXPECT_EQ(refusal(values), ": " + scaling + "original_context_length: 0 is below 1");
  std::vector<Tensor> tensors = good_tensors();
  for (const char* name : {"rope_factors_short.weight", "rope_factors_long.weight"}) tensors.push_back({name, 3, 0});
  values = with(scaling + "attn_factor", value(scaling + "attn_factor", kFloat32, inf));
  EXPECT_EQ(refusal(values, tensors), ": " + scaling + "attn_factor: inf is not finite");
}

// A few bytes that speak of many experts or heads: the pieces of their tensors would fill the memory.
TEST_F(GgufModelTest, CountsThatNoTensorHasRoomForAreRefusedAtOnce) {
  std::vector<Tensor> tensors = good_tensors();
  for (const std::string layer : {"blk.0.", "blk.1."}) tensors.push_back({layer + "ffn_gate_inp.weight", 4, 8});
  Values values = with("llama.expert_count", 65536);
  values.emplace_back("", value("llama.expert_used_count", kUint32, 2u));
  const std::string experts = ": llama.expert_count: 65536 is more than the 32 numbers of blk.";
  EXPECT_EQ(refusal(values, tensors), experts + "0.ffn_gate_inp.weight");
  tensors[tensors.size() - 2] = {"blk.0.ffn_gate_inp.weight", 65536, 1};
  EXPECT_EQ(refusal(values, tensors), experts + "1.ffn_gate_inp.weight");
  values = with("llama.attention.head_count", 65536);
  EXPECT_EQ(refusal(values), ": llama.attention.head_count: 65536 is more than the 96 numbers of blk.0.attn_q.weight");
  std::erase_if(tensors, [](const Tensor& tensor) { return tensor.name == "blk.1.attn_q.weight"; });
  EXPECT_EQ(refusal(good_values(), tensors), ": blk.1.attn_q.weight: is missing");
}

TEST_F(GgufModelTest, WhatWeLackIsRefusedByName) {
  const auto text = [](const std::string& key, const std::string& v) { return with(key, text_value(key, v)); };
  const auto real = [](const std::string& key, float v) { return with(key, value(key, kFloat32, v)); };
  const auto without_key_length = [](uint32_t heads) {
    Values values = with("llama.attention.head_count", heads);
    std::erase_if(values, [](const auto& v) { return v.first == "llama.attention.key_length"; });
    return values;
  };
  std::vector<Tensor> llama3 = good_tensors();
  llama3.push_back({"rope_freqs.weight", 2, 0});
  struct Case {
    Values values;
    std::string message;
    std::vector<Tensor> tensors = good_tensors();
  };
  const std::string known =
      " (supported: llama, qwen2, qwen3, qwen2moe, qwen3moe, olmoe, granitemoe, phimoe, glm4moe, deepseek2, gpt-oss)";
  const Case cases[] = {
      {text("general.architecture", "gemma\n"), R"(: general.architecture: 'gemma\x0a' is not supported)" + known},
      {without("general.architecture"), ": general.architecture: '' is not supported" + known},
      {with("general.architecture", 3), ": general.architecture: is not a string"},
      {without("llama.embedding_length"), ": llama.embedding_length: is missing"},
      {real("llama.embedding_length", 8.0f), ": llama.embedding_length: is not a whole number"},
      {without("llama.attention.layer_norm_rms_epsilon"), ": llama.attention.layer_norm_rms_epsilon: is missing"},
      {without_key_length(3), ": llama.attention.head_count: 3 does not divide embedding_length (8)"},
      {with("llama.attention.head_count", uint32_t{0}),
       ": llama.attention.head_count: 0 does not divide embedding_length (8)"},
      {with("llama.attention.value_length", 8), ": llama.attention.value_length: 8 is not supported (6 is)"},
      {with("llama.rope.dimension_count", 2), ": llama.rope.dimension_count: 2 is not supported (6 is)"},
      {with("llama.vocab_size", 6), ": llama.vocab_size: 6 is not supported (5 is)"},
      {text("llama.rope.scaling.type", "longrope"),
       ": llama.rope.scaling.type: 'longrope' is not supported (supported: none, linear, yarn)"},
      {real("llama.rope.scaling.factor", 2.0f), ": llama.rope.scaling.factor: is given without rope.scaling.type"},
      {good_values(), ": rope_freqs.weight: 2 factors, not 3", llama3},
      {with("llama.expert_count", 8), ": layers[0].top_k: 0 is not in [1, 8], the number of experts"},
      {with("llama.logit_scale", 8), ": 'llama.logit_scale': is not supported"},
      {with("llama.block_count", 1u << 31), ": llama.block_count: 2147483648 layers do not fit the file's 20 tensors"},
      {with("llama.feed_forward_length", uint32_t{0}), ": layers[0].intermediate_size: 0 is not in [1, 16777216]"},
      {good_values(), ": token_embd.weight: is missing or not a matrix", {}},
  };
  for (const Case& c : cases) EXPECT_EQ(refusal(c.values, c.tensors), c.message);
  EXPECT_EQ(refusal(text("llama.rope.scaling.type", "none")), "");
}

TEST_F(GgufModelTest, TensorsThatContradictTheConfigAreRefused) {
  const auto message_of = [&](const std::vector<Tensor>& tensors) {
    const std::string path = write_file(good_values(), tensors);
    const GgufSource file(path);
    const ModelConfig config = config_from_gguf(file);
    return corrupt_message([&] { LogicalReader(file, map_of_gguf(file, config)); }, path);
  };
  std::vector<Tensor> tensors = good_tensors();
  tensors[3] = {"blk.0.attn_q.weight", 8, 8};
  EXPECT_EQ(message_of(tensors), ": blk.0.attn_q.weight: shape [8, 8] is not [12, 8]");
  tensors[3] = {"blk.0.attn_q.weight", 12, 6};
  EXPECT_EQ(message_of(tensors), ": blk.0.attn_q.weight: shape [12, 6] is not [12, 8]");
  tensors = good_tensors();
  tensors.push_back({"blk.0.ffn_norm_2.weight", 8, 0});
  EXPECT_EQ(message_of(tensors), ": 'blk.0.ffn_norm_2.weight': not a tensor of this model");
  tensors.back().name = "evil\nFAKE LINE\x1b[31m";
  EXPECT_EQ(message_of(tensors), R"(: 'evil\x0aFAKE LINE\x1b[31m': not a tensor of this model)");
}

}  // namespace
}  // namespace coterie
