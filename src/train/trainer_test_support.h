// For tests of whole runs: a small random corpus with settings to train on it, and a model that meets every kind of
// layer.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "train/trainer.h"

namespace coterie {

inline constexpr int64_t kVocab = 61;

class TinyCorpus : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() / ("coterie-train-" + std::to_string(getpid()));
    std::filesystem::create_directories(dir_ / "data");
    write_split("train", 5000, 1);
    write_split("valid", 700, 2);
    std::ofstream(dir_ / "data/meta.json") << R"({"format": 1, "vocab_size": 61, "dtype": "uint16", "eos_token_id": 0,
      "train": {"tokens": 5000, "bytes": 20000, "documents": 1}, "valid": {"tokens": 700, "bytes": 2800, "documents": 1}})";
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void write_split(const std::string& split, size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<uint16_t> ids(count);
    for (uint16_t& id : ids) id = static_cast<uint16_t>(random() % kVocab);
    std::ofstream(dir_ / "data" / (split + ".bin"), std::ios::binary)
        .write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(2 * count));
  }

  RunSettings settings(const std::string& name, const std::string& dtype = "fp32") const {
    RunSettings s;
    s.data = {(dir_ / "data").string(), 16};
    s.train = {.output_dir = (dir_ / name).string(),
               .tokens = 12 * 4 * 16,
               .batch_size = 4,
               .gradient_accumulation_steps = 2,
               .learning_rate = 1e-2,
               .min_learning_rate = 1e-3,
               .warmup_tokens = 64,
               .decay_tokens = 12 * 64,
               .weight_decay = 0.1,
               .dtype = dtype,
               .seed = 7,
               .threads = 2};
    return s;
  }

  std::filesystem::path dir_;
};

// A dense layer, and a residual MoE layer with limited capacity, so that every random choice is met.
inline ModelConfig tiny_config() {
  ModelConfig c;
  c.vocab_size = kVocab;
  c.hidden_size = 24;
  c.num_heads = c.num_kv_heads = 3;
  c.head_dim = 8;
  c.max_position_embeddings = 32;
  c.layers.resize(2);
  c.layers[0].intermediate_size = 32;
  c.layers[1] = {.intermediate_size = 16, .expert_intermediate_size = 24, .residual = ResidualKind::kSum, .router = {}};
  c.layers[1].router = {.num_experts = 4, .top_k = 1, .capacity_factor = 1.0f, .min_capacity = 2};
  return c;
}

// Dropless, since places are counted per pass, of all ranks; random choices are met in the jitter.
inline ModelConfig dropless_config() {
  ModelConfig config = tiny_config();
  config.initializer_range = 0.1f;  // for its width
  config.layers[1].router.capacity_factor = 0;
  config.layers[1].router.top_k = 2;
  config.layers[1].router.jitter = 0.05f;
  config.layers[1].router.choice_bias = true;
  return config;
}

// A pyramid: 4 experts, then 8 beside an MLP.
inline ModelConfig pyramid_config(float capacity_factor) {
  ModelConfig config = dropless_config();
  config.layers[0] = {.expert_intermediate_size = 24, .router = {.num_experts = 4, .top_k = 1}};
  config.layers[1].router.num_experts = 8;
  for (LayerConfig& layer : config.layers)
    layer.router.capacity_factor = layer.router.eval_capacity_factor = capacity_factor;
  return config;
}

}  // namespace coterie
