#include "coterie/engine.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/thread_pool.h"
#include "engine/kv_cache.h"
#include "io/test_files.h"
#include "model/decoder.h"
#include "model/stored_model.h"
#include "model/test_model.h"

namespace coterie {
namespace {

class EngineTest : public TemporaryDirectoryTest {
 protected:
  void SetUp() override {
    TemporaryDirectoryTest::SetUp();
    write_random_model(directory(), small_config());
    engine_ = Engine::load(directory().string());
  }

  static std::vector<int32_t> tokens(int64_t n, int64_t from = 0) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>((i * i * 7 + 3 * i + from) % 61));
    return ids;
  }

  std::string refusal(const Request& request) {
    return invalid_message([&] { engine_->generate(request); }, "");
  }

  std::unique_ptr<Engine> engine_;
};

TEST_F(EngineTest, RunsWithoutWeightsOfAFile) {
  std::filesystem::remove(directory() / "model.safetensors");
  const auto answer = [&] {
    return Engine::load(directory().string(), {.load_format = "dummy"})->generate({tokens(9), {.max_new_tokens = 8}});
  };
  const std::vector<int32_t> first = answer().completions[0].token_ids;
  EXPECT_EQ(first.size(), 8);
  EXPECT_EQ(answer().completions[0].token_ids, first);
}

// A long prompt at once, whose tokens take turns at the experts, and in steps of few tokens, that none of them waits
// in.
TEST_F(EngineTest, TokensThatTakeTurnsAtTheExpertsGiveTheSameBits) {
  for (const float multiplier : {1.0f, 0.5f}) {
    ModelConfig config = small_config();
    config.max_position_embeddings = 1024;
    config.residual_multiplier = multiplier;
    write_random_model(directory(), config);
    const auto logits = [&](int64_t tokens_of_step) {
      const EngineOptions options = {.max_num_batched_tokens = tokens_of_step};
      const auto engine = Engine::load(directory().string(), options);
      return engine->generate({tokens(700), {.max_new_tokens = 1, .prompt_logprobs = 0}}).prompt_logprobs;
    };
    const std::vector<PositionLogprobs> whole = logits(2048), parts = logits(100);
    ASSERT_EQ(whole.size(), 699u);
    for (size_t t = 0; t < whole.size(); ++t) EXPECT_EQ(whole[t].chosen.logprob, parts[t].chosen.logprob) << t;
  }
}

TEST_F(EngineTest, CacheFollowsTheWeightsOfAttention) {
  const std::vector<int32_t> ids = tokens(40);
  const auto logits = [&](EngineOptions options) { return Engine::load(directory().string(), options)->logits(ids); };
  const std::vector<float> few = logits({.dtype = "int4"}),
                           plain = logits({.dtype = "int4", .attention_dtype = "bf16"});
  EXPECT_EQ(few, logits({.dtype = "int4", .kv_cache_dtype = "int8"}));
  EXPECT_NE(few, logits({.dtype = "int4", .kv_cache_dtype = "bf16"}));
  EXPECT_EQ(plain, logits({.dtype = "int4", .attention_dtype = "bf16", .kv_cache_dtype = "bf16"}));
}

// Mapped, with room for two experts, for all, and for none: the same logits again and again while experts come and go.
TEST_F(EngineTest, MappedWeightsGiveTheSameWhateverExpertsAreHeld) {
  const std::vector<int32_t> ids = tokens(40);
  const std::vector<float> expected = Engine::load(directory().string(), {.dtype = "int8"})->logits(ids);
  for (const int64_t bytes : {8000, 0, -1}) {
    const auto engine =
        Engine::load(directory().string(), {.dtype = "int8", .mmap = true, .expert_cache_bytes = bytes});
    for (int i = 0; i < 5; ++i) EXPECT_EQ(engine->logits(ids), expected);
    const EngineStats stats = engine->stats();
    if (bytes < 0) continue;
    EXPECT_GT(stats.experts_held, 0);
    EXPECT_LE(stats.experts_held, stats.expert_cache_capacity);
    EXPECT_GT(stats.expert_hits, 0);
    EXPECT_GE(stats.expert_uses, stats.expert_hits);
  }
}

TEST_F(EngineTest, NothingIsCopiedOfWeightsThatComeFromNoFile) {
  const auto engine = Engine::load(directory().string(), {.mmap = true, .load_format = "dummy"});
  engine->logits(tokens(40));
  EXPECT_EQ(engine->stats().expert_cache_capacity, 0);
}

TEST_F(EngineTest, RefusesByFieldAndValue) {
  EXPECT_EQ(refusal({{}, {}}), "prompt_token_ids: empty");
  EXPECT_EQ(refusal({{1, 61}, {}}), "prompt_token_ids[1]: 61 is not in [0, 61), the vocabulary");
  EXPECT_EQ(refusal({{-1}, {}}), "prompt_token_ids[0]: -1 is not in [0, 61), the vocabulary");
  EXPECT_EQ(refusal({tokens(96), {}}), "prompt_token_ids: 96 tokens, but at most 95 fit max_model_len (96)");
  EXPECT_EQ(refusal({{1}, {.top_p = 0.0f}}), "top_p: 0 is not in (0, 1]");
  EXPECT_EQ(refusal({{1}, {.logit_bias = {{61, 1.0f}}}}), "logit_bias: 61 is not in [0, 61), the vocabulary");
  EXPECT_EQ(invalid_message([&] { engine_->logits(tokens(97)); }, ""),
            "token_ids: 97 tokens, but at most 96 fit max_model_len (96)");
  const auto load = [&](const EngineOptions& options) {
    return invalid_message([&] { Engine::load(directory().string(), options); }, "");
  };
  EXPECT_EQ(load({.dtype = "fp8"}), "dtype: 'fp8' is not one of fp32, bf16, int8, int8a16, int4, int4_64");
  EXPECT_EQ(load({.threads = -1}), "threads: -1 is negative");
  EXPECT_EQ(load({.max_model_len = 97}), "max_model_len: 97 is not in [1, 96], the positions of the model (0: all)");
  EXPECT_EQ(load({.max_num_seqs = 0}), "max_num_seqs: 0 is below 1");
  EXPECT_EQ(load({.max_num_batched_tokens = -5}), "max_num_batched_tokens: -5 is below 1");
  EXPECT_EQ(load({.kv_cache_dtype = "fp8"}), "kv_cache_dtype: 'fp8' is not one of auto, fp32, bf16, int8");
  EXPECT_EQ(load({.block_size = 20}), "block_size: 20 is not a multiple of 16 up to 1024");
  EXPECT_EQ(load({.block_size = int64_t{1} << 60}),
            "block_size: 1152921504606846976 is not a multiple of 16 up to 1024");
  EXPECT_EQ(load({.num_kv_blocks = -1}), "num_kv_blocks: -1 is negative");
  EXPECT_EQ(load({.load_format = "pt"}), "load_format: 'pt' is not one of auto, dummy");
  EXPECT_EQ(load({.kv_cache_bytes = 1000}), "kv_cache_bytes: 1000 is less than a block (40960)");
  EXPECT_EQ(invalid_message([] { Engine::load("/nowhere"); }, ""), "/nowhere: no such file or directory");
}

// Token by token over the cache gives the same as the whole sequence at once.
TEST_F(EngineTest, GreedyFollowsTheLogitsOfTheWholeSequence) {
  const std::vector<int32_t> prompt = tokens(20);
  const CompletionOutput output = engine_->generate({prompt, {.max_new_tokens = 40}}).completions[0];
  ASSERT_EQ(output.token_ids.size(), 40u);
  EXPECT_EQ(output.finish_reason, FinishReason::kLength);
  std::vector<int32_t> all = prompt;
  all.insert(all.end(), output.token_ids.begin(), output.token_ids.end());
  const std::vector<float> logits = engine_->logits(all);
  for (size_t i = 0; i < 40; ++i) {
    const auto row = logits.begin() + (prompt.size() + i - 1) * 61;
    EXPECT_EQ(std::max_element(row, row + 61) - row, output.token_ids[i]) << i;
  }
}

TEST_F(EngineTest, EndsAtStopTokensTheModelLengthOrTheCallersWord) {
  const std::vector<int32_t> prompt = tokens(20);
  const std::vector<int32_t> free = engine_->generate({prompt, {.max_new_tokens = 30}}).completions[0].token_ids;
  const int64_t stop = free[4];
  const size_t first = std::find(free.begin(), free.end(), stop) - free.begin();
  const CompletionOutput stopped =
      engine_->generate({prompt, {.max_new_tokens = 30, .stop_token_ids = {stop}}}).completions[0];
  EXPECT_EQ(stopped.finish_reason, FinishReason::kStop);
  EXPECT_EQ(stopped.token_ids, std::vector<int32_t>(free.begin(), free.begin() + first + 1));

  const CompletionOutput full = engine_->generate({prompt, {.max_new_tokens = 1000}}).completions[0];
  EXPECT_EQ(full.finish_reason, FinishReason::kLength);
  EXPECT_EQ(full.token_ids.size(), 96u - prompt.size());

  std::vector<int32_t> seen;
  const auto on_output = [&](const StepOutput& output) {
    seen.insert(seen.end(), output.new_token_ids.begin(), output.new_token_ids.end());
    return seen.size() < 3;
  };
  const CompletionOutput aborted = engine_->generate({prompt, {.max_new_tokens = 30}}, on_output).completions[0];
  EXPECT_EQ(aborted.finish_reason, FinishReason::kAborted);
  EXPECT_EQ(aborted.token_ids, seen);
  EXPECT_EQ(seen, std::vector<int32_t>(free.begin(), free.begin() + 3));
}

TEST_F(EngineTest, EndTokensOfTheModelCountUnlessIgnored) {
  ModelConfig config = small_config();
  const std::vector<int32_t> prompt = tokens(20);
  const auto generated = [&](Engine& engine, const SamplingParams& sampling) {
    return engine.generate({prompt, sampling}).completions[0].token_ids;
  };
  const std::vector<int32_t> free = generated(*engine_, {.max_new_tokens = 5});
  config.eos_token_ids = {free[0]};
  write_random_model(directory(), config);
  const auto engine = Engine::load(directory().string());
  EXPECT_EQ(generated(*engine, {.max_new_tokens = 5}), std::vector<int32_t>{free[0]});
  EXPECT_EQ(generated(*engine, {.max_new_tokens = 5, .ignore_eos = true}), free);
  const std::vector<int32_t> late = generated(*engine, {.max_new_tokens = 5, .min_tokens = 2});
  ASSERT_GE(late.size(), 2u);
  EXPECT_EQ(std::count(late.begin(), late.begin() + 2, free[0]), 0);
}

TEST_F(EngineTest, LikelihoodIsThatOfTheLogits) {
  const std::vector<int32_t> ids = tokens(90);  // more than one chunk of logits
  const std::vector<float> logits = engine_->logits(ids);
  double expected = 0;
  for (size_t t = 0; t + 1 < ids.size(); ++t) {
    double sum = 0;
    for (int64_t v = 0; v < 61; ++v) sum += std::exp(static_cast<double>(logits[t * 61 + v]));
    expected += std::log(sum) - logits[t * 61 + ids[t + 1]];
  }
  // Of each token: an exponential errs by a few units in the last place, the sum of 61 of them by one for each step.
  EXPECT_NEAR(engine_->negative_log_likelihood(ids), expected, 89 * 16 * 0x1p-24);
  EXPECT_EQ(engine_->negative_log_likelihood({5}), 0.0);
  EXPECT_GT(engine_->negative_log_likelihood(tokens(97)), 0);  // the last token needs no position
  EXPECT_EQ(invalid_message([&] { engine_->negative_log_likelihood(tokens(98)); }, ""),
            "token_ids: 98 tokens, but at most 97 fit max_model_len (96)");
}

TEST_F(EngineTest, ThreadsDoNotChangeABit) {
  const auto one = Engine::load(directory().string(), {.threads = 1});
  const auto three = Engine::load(directory().string(), {.threads = 3});
  EXPECT_EQ(one->logits(tokens(70)), three->logits(tokens(70)));
  EXPECT_EQ(one->expert_ids(tokens(70)), three->expert_ids(tokens(70)));
}

// Rows of several sequences in one batch have the bits that they have alone.
TEST_F(EngineTest, BatchedSequencesEqualSingleOnes) {
  const StoredModel stored(directory().string());
  NativeThreadPool pool(2);
  const ModelWeights weights = load_weights(stored.config(), stored.tensors(), WeightTypes{}, pool);
  Decoder decoder(stored.config(), weights, pool);
  KvCache cache(stored.config(), DType::kF32, 16, 16);
  const std::vector<int32_t> a = tokens(37), b = tokens(19, 5);
  const auto alone = [&](const std::vector<int32_t>& ids) {
    BlockTable blocks(cache);
    blocks.reserve(ids.size());
    Batch batch;
    batch.add(ids, 0, blocks.layers());
    const float* hidden = decoder.forward(batch);
    return std::vector<float>(hidden, hidden + ids.size() * 20);
  };
  std::vector<float> expected = alone(a);
  const std::vector<float> expected_b = alone(b);
  expected.insert(expected.end(), expected_b.begin(), expected_b.end());

  BlockTable blocks_a(cache), blocks_b(cache);
  blocks_a.reserve(a.size());
  blocks_b.reserve(b.size());
  Batch batch;
  batch.add(a, 0, blocks_a.layers());
  batch.add(b, 0, blocks_b.layers());
  const float* hidden = decoder.forward(batch);
  EXPECT_EQ(std::vector<float>(hidden, hidden + expected.size()), expected);
}

}  // namespace
}  // namespace coterie
