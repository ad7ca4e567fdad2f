// Many requests at once: each gives what it gives alone, whatever else runs, waits, is cancelled or runs out of blocks.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "coterie/engine.h"
#include "coterie/error.h"
#include "io/test_files.h"
#include "model/test_model.h"

namespace coterie {
namespace {

class ServingTest : public TemporaryDirectoryTest {
 protected:
  void SetUp() override {
    TemporaryDirectoryTest::SetUp();
    write_random_model(directory(), small_config());
  }

  // In small blocks, many of which a short text has.
  std::unique_ptr<Engine> load(EngineOptions options) {
    options.block_size = 16;
    return Engine::load(directory().string(), options);
  }

  static std::vector<int32_t> tokens(int64_t n, int64_t from = 0) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>((i * i * 7 + 3 * i + from) % 61));
    return ids;
  }

  // By completion: the tokens of a request in the outputs of many steps.
  using Completions = std::map<int64_t, std::vector<int32_t>>;
  static void collect(std::map<RequestId, Completions>& texts, const std::vector<StepOutput>& outputs) {
    for (const StepOutput& output : outputs) {
      std::vector<int32_t>& text = texts[output.request_id][output.index];
      text.insert(text.end(), output.new_token_ids.begin(), output.new_token_ids.end());
    }
  }
  static std::map<RequestId, Completions> run(Engine& engine) {
    std::map<RequestId, Completions> texts;
    while (engine.has_unfinished()) collect(texts, engine.step());
    return texts;
  }
  static Completions completions(const RequestOutput& output) {
    Completions result;
    for (size_t i = 0; i < output.completions.size(); ++i) result[i] = output.completions[i].token_ids;
    return result;
  }
};

// Half of the requests begin with one of three texts, so that they share blocks.
Request random_request(std::mt19937& random) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  Request request;
  if (below(2) == 0) {
    const int64_t text = below(3), length = 10 + below(40);
    for (int64_t i = 0; i < length; ++i) request.prompt_token_ids.push_back((i * i + 5 * text) % 61);
  }
  const int64_t own = 1 + below(30);
  for (int64_t i = 0; i < own; ++i) request.prompt_token_ids.push_back(static_cast<int32_t>(below(61)));
  SamplingParams& sampling = request.sampling;
  sampling.n = below(8) == 0 ? 3 : 1;
  sampling.max_new_tokens = 1 + below(50);
  sampling.seed = below(1000);
  if (below(2) == 0) {
    sampling.temperature = 0.5f + 0.1f * static_cast<float>(below(10));
    sampling.top_k = below(2) * 20;
    sampling.top_p = below(2) ? 0.9f : 1.0f;
  }
  if (below(4) == 0) sampling.repetition_penalty = 1.3f, sampling.frequency_penalty = 0.2f;
  if (below(4) == 0) sampling.stop_token_ids = {below(61), below(61)};
  request.priority = below(3);
  return request;
}

// One of cancel_every steps cancels a request.
void expect_random_requests_equal_single_ones(Engine& alone, Engine& engine, std::mt19937& random,
                                              int cancel_every = 40) {
  std::map<RequestId, Request> requests;
  std::map<RequestId, std::map<int64_t, std::vector<int32_t>>> texts;
  std::set<RequestId> cancelled, ended;
  for (int step = 0; requests.size() < 200 || engine.has_unfinished(); ++step) {
    ASSERT_LT(step, 20000) << "it does not come to an end";
    for (uint64_t arrivals = random() % 4; arrivals > 0 && requests.size() < 200; --arrivals) {
      const Request request = random_request(random);
      requests[engine.add_request(request)] = request;
    }
    if (random() % cancel_every == 0 && !requests.empty()) {
      const RequestId id = 1 + random() % requests.size();
      if (!ended.contains(id)) engine.abort(id), cancelled.insert(id);
    }
    for (const StepOutput& output : engine.step()) {
      ASSERT_FALSE(cancelled.contains(output.request_id)) << "an output of a cancelled request";
      std::vector<int32_t>& text = texts[output.request_id][output.index];
      text.insert(text.end(), output.new_token_ids.begin(), output.new_token_ids.end());
      if (output.finish_reason) ended.insert(output.request_id);
    }
  }
  EXPECT_GT(cancelled.size(), 5u);
  EXPECT_LT(cancelled.size(), 60u);
  for (const auto& [id, request] : requests) {
    if (cancelled.contains(id)) continue;
    const RequestOutput expected = alone.generate(request);
    ASSERT_EQ(texts[id].size(), static_cast<size_t>(request.sampling.n));
    for (int64_t i = 0; i < request.sampling.n; ++i) {
      EXPECT_EQ(texts[id][i], expected.completions[i].token_ids) << "request " << id << " completion " << i;
    }
  }
  EXPECT_EQ(engine.stats().num_free_kv_blocks, engine.stats().num_kv_blocks) << "blocks were lost";
  EXPECT_EQ(engine.stats().num_running + engine.stats().num_waiting, 0);
}

TEST_F(ServingTest, RandomRequestsEqualSingleOnes) {
  const EngineOptions plain = {.threads = 1, .max_num_batched_tokens = 4096, .enable_prefix_caching = false};
  std::mt19937 random(1);
  for (const char* cache : {"fp32", "bf16", "int8"}) {
    SCOPED_TRACE(cache);
    EngineOptions options = plain;
    options.kv_cache_dtype = cache;
    const auto alone = load(options);
    // 96 tokens are 6 blocks: two of the longest fit.
    for (const EngineOptions& tight :
         {EngineOptions{.threads = 1, .max_num_seqs = 8, .max_num_batched_tokens = 40, .num_kv_blocks = 12},
          EngineOptions{.threads = 2, .max_num_batched_tokens = 7, .num_kv_blocks = 14},
          EngineOptions{.threads = 1, .num_kv_blocks = 6, .enable_prefix_caching = false}}) {
      EngineOptions crowded = tight;
      crowded.kv_cache_dtype = cache;
      const auto engine = load(crowded);
      expect_random_requests_equal_single_ones(*alone, *engine, random);
      EXPECT_GT(engine->stats().num_preemptions, 5) << crowded.num_kv_blocks << " blocks are too many for this test";
      if (HasFailure()) return;
    }
  }
}

TEST_F(ServingTest, RandomRequestsEqualSingleOnesWhateverTheAttention) {
  std::mt19937 random(2);
  for (const auto& [name, config] :
       {std::pair("windowed", windowed_config()), {"longrope", longrope_config()}, {"latent", latent_config()}}) {
    SCOPED_TRACE(name);
    write_random_model(directory(), config);
    for (const char* cache : {"fp32", "int8"}) {
      const auto alone =
          load({.threads = 1, .max_num_batched_tokens = 4096, .kv_cache_dtype = cache, .enable_prefix_caching = false});
      const auto engine = load({.threads = 2,
                                .max_num_seqs = 8,
                                .max_num_batched_tokens = 40,
                                .kv_cache_dtype = cache,
                                .num_kv_blocks = 12});
      expect_random_requests_equal_single_ones(*alone, *engine, random);
      EXPECT_GT(engine->stats().num_preemptions, 5);
      if (HasFailure()) return;
    }
  }
}

// Each token is what a whole text of that length gives, on both sides of the original context.
TEST_F(ServingTest, WhoOutgrowsTheOriginalContextIsComputedAnew) {
  write_random_model(directory(), longrope_config());
  for (const bool caching : {false, true}) {
    const auto engine = load({.enable_prefix_caching = caching});
    for (const int64_t length : {20, 47, 48, 49}) {  // 48 is the original context
      SCOPED_TRACE(length);
      const RequestOutput output = engine->generate({tokens(length), {.max_new_tokens = 40, .prompt_logprobs = 0}});
      EXPECT_EQ(output.prompt_logprobs.size(), static_cast<size_t>(length - 1));
      std::vector<int32_t> text = tokens(length);
      for (const int32_t token : output.completions[0].token_ids) {
        const std::vector<float> logits = engine->logits(text);
        const auto last = logits.end() - 61;
        ASSERT_EQ(std::max_element(last, logits.end()) - last, token) << text.size() << " tokens";
        text.push_back(token);
      }
      EXPECT_EQ(text.size(), static_cast<size_t>(length + 40));
    }
  }
}

// Completions that outgrow the original context together share what they begin with, as they did before: the first one
// computes it, the others wait for that.
TEST_F(ServingTest, WhoOutgrowTheOriginalContextTogetherShareBlocks) {
  const auto most_held_blocks = [&](const ModelConfig& config) {
    write_random_model(directory(), config);
    const auto engine = load({});
    Request request = {tokens(46), {.max_new_tokens = 20}};
    request.sampling.n = 6, request.sampling.temperature = 1.0f, request.sampling.seed = 3;
    engine->add_request(request);
    int64_t most = 0;
    while (engine->has_unfinished()) {
      engine->step();
      most = std::max(most, engine->stats().num_kv_blocks - engine->stats().num_free_kv_blocks);
    }
    return most;
  };
  EXPECT_EQ(most_held_blocks(longrope_config()), most_held_blocks(small_config()));
}

// The draft model is the model itself, slightly off, so that it is right often and wrong often.
TEST_F(ServingTest, SpeculationChangesNothing) {
  const std::filesystem::path draft = directory() / "draft";
  std::mt19937 random(3);
  for (const ModelConfig& config : {small_config(), windowed_config(), longrope_config(), latent_config()}) {
    write_random_model(directory(), config);
    write_random_model(draft, config, 0.45f);
    for (const EngineOptions& speculating :
         {EngineOptions{.max_num_seqs = 8,
                        .max_num_batched_tokens = 60,
                        .num_kv_blocks = 12,
                        .speculation = "prompt_lookup",
                        .prompt_lookup_min = 1,
                        .adaptive_speculation = false},
          EngineOptions{.kv_cache_dtype = "int8", .num_kv_blocks = 14, .speculation = "prompt_lookup"},
          EngineOptions{.max_num_seqs = 8,
                        .max_num_batched_tokens = 60,
                        .kv_cache_dtype = "int8",
                        .num_kv_blocks = 12,
                        .speculation = "draft",
                        .draft_model = draft.string(),
                        .max_speculated_tokens = 4,
                        .adaptive_speculation = false},
          EngineOptions{.num_kv_blocks = 12, .speculation = "draft", .draft_model = draft.string()}}) {
      SCOPED_TRACE(speculating.speculation);
      const auto alone =
          load({.threads = 1, .kv_cache_dtype = speculating.kv_cache_dtype, .enable_prefix_caching = false});
      const auto engine = load(speculating);
      expect_random_requests_equal_single_ones(*alone, *engine, random, 12);
      const EngineStats stats = engine->stats();
      EXPECT_GT(stats.num_preemptions, 5);
      if (!speculating.adaptive_speculation) {
        EXPECT_GT(stats.num_accepted_tokens, 100);
        EXPECT_GT(stats.num_speculated_tokens, stats.num_accepted_tokens + 100);
      }
      if (HasFailure()) return;
    }
  }
}

TEST_F(ServingTest, SpeculationChangesNothingWhateverTheWeights) {
  for (const char* dtype : {"bf16", "int8", "int4"}) {
    SCOPED_TRACE(dtype);
    const auto alone = load({.dtype = dtype});
    const auto engine =
        load({.dtype = dtype, .speculation = "prompt_lookup", .prompt_lookup_min = 1, .adaptive_speculation = false});
    for (int32_t i = 0; i < 20; ++i) {
      const Request request = {tokens(10 + i, i), {.max_new_tokens = 60, .temperature = 0.3f * (i % 3)}};
      EXPECT_EQ(completions(engine->generate(request)), completions(alone->generate(request)));
    }
    EXPECT_GT(engine->stats().num_accepted_tokens, 20);
  }
}

// A draft model that is the model itself is always right: a step gives all it can.
TEST_F(ServingTest, RightGuessesSaveSteps) {
  const auto alone = load({});
  const auto engine = load({.speculation = "draft",
                            .draft_model = directory().string(),
                            .max_speculated_tokens = 3,
                            .adaptive_speculation = false});
  for (const float temperature : {0.0f, 1.0f}) {
    const Request request = {tokens(30), {.max_new_tokens = 21, .temperature = temperature, .logprobs = 2}};
    std::vector<size_t> gains;
    const RequestOutput output = engine->generate(request, [&](const StepOutput& step) {
      gains.push_back(step.new_token_ids.size());
      EXPECT_EQ(step.logprobs.size(), step.new_token_ids.size());
      return true;
    });
    EXPECT_EQ(gains, (std::vector<size_t>{1, 4, 4, 4, 4, 4}));
    const RequestOutput expected = alone->generate(request);
    ASSERT_EQ(completions(output), completions(expected));
    for (size_t i = 0; i < 21; ++i) {
      EXPECT_EQ(output.completions[0].logprobs[i].chosen.logprob, expected.completions[0].logprobs[i].chosen.logprob);
      EXPECT_EQ(output.completions[0].logprobs[i].rank, expected.completions[0].logprobs[i].rank);
    }
  }
  EXPECT_EQ(engine->stats().num_speculated_tokens, 30);
  EXPECT_EQ(engine->stats().num_accepted_tokens, 30);
}

// Also behind guesses that were wrong, which it has seen.
TEST_F(ServingTest, TheDraftModelGuessesWhatItSaysAlone) {
  const std::string draft_path = (directory() / "draft").string();
  write_random_model(draft_path, small_config(), 0.45f);
  const auto draft = Engine::load(draft_path);
  const auto engine = load(
      {.speculation = "draft", .draft_model = draft_path, .max_speculated_tokens = 3, .adaptive_speculation = false});
  int64_t guessed = 0, accepted = 0;
  for (const int64_t length : {5, 40}) {
    std::vector<int32_t> text = tokens(length);
    const std::vector<int32_t> output = engine->generate({text, {.max_new_tokens = 50}}).completions[0].token_ids;
    text.push_back(output[0]);
    for (size_t position = 1; position < output.size(); ++position) {
      const auto left = static_cast<int64_t>(output.size() - position);
      const int64_t depth = std::min<int64_t>(3, left - 1);
      std::vector<int32_t> guess;
      if (depth > 0) guess = draft->generate({text, {.max_new_tokens = depth}}).completions[0].token_ids;
      guessed += depth;
      for (const int32_t token : guess) {
        if (token != output[position]) break;
        text.push_back(output[position++]);
        ++accepted;
      }
      text.push_back(output[position]);
    }
  }
  EXPECT_EQ(engine->stats().num_speculated_tokens, guessed);
  EXPECT_EQ(engine->stats().num_accepted_tokens, accepted);
  EXPECT_GT(accepted, 10);
  EXPECT_LT(accepted, guessed - 10);
}

TEST_F(ServingTest, MaskedRequestsGoWithoutSpeculation) {
  const auto engine =
      load({.speculation = "draft", .draft_model = directory().string(), .adaptive_speculation = false});
  Request request = {tokens(10), {.max_new_tokens = 20}};
  request.token_mask = [](int64_t, std::span<const int32_t>, std::span<uint32_t> allowed) {
    std::ranges::fill(allowed, 0x55555555u);
  };
  EXPECT_EQ(completions(engine->generate(request)), completions(load({})->generate(request)));
  EXPECT_EQ(engine->stats().num_speculated_tokens, 0);
}

TEST_F(ServingTest, RefusesSpeculationThatCannotBe) {
  const auto refusal = [&](const EngineOptions& options) { return invalid_message([&] { load(options); }, ""); };
  EXPECT_EQ(refusal({.speculation = "on"}), "speculation: 'on' is not one of off, prompt_lookup, draft");
  EXPECT_EQ(refusal({.speculation = "draft"}), "draft_model: speculation 'draft' needs one");
  EXPECT_EQ(refusal({.draft_model = "x"}), "draft_model: only speculation 'draft' uses one");
  EXPECT_EQ(refusal({.max_speculated_tokens = 0}), "max_speculated_tokens: 0 is below 1");
  EXPECT_EQ(refusal({.prompt_lookup_min = 5}), "prompt_lookup_max: 4 is below 5");
  ModelConfig other = small_config();
  other.vocab_size = 60;
  const std::string draft = (directory() / "draft").string();
  write_random_model(draft, other);
  EXPECT_EQ(refusal({.speculation = "draft", .draft_model = draft}),
            "draft_model: " + draft + ": its vocabulary has 60 tokens, the model's 61");
}

TEST_F(ServingTest, CompletionsOfAPromptShareItAndDiffer) {
  const auto engine = load({});
  const Request request = {tokens(40), {.n = 4, .max_new_tokens = 12, .temperature = 1.0f, .seed = 5}};
  std::map<int64_t, int64_t> cached;
  const RequestOutput output = engine->generate(request, [&](const StepOutput& step) {
    cached[step.index] = step.num_cached_tokens;
    return true;
  });
  EXPECT_EQ(cached, (std::map<int64_t, int64_t>{{0, 0}, {1, 32}, {2, 32}, {3, 32}}));
  std::set<std::vector<int32_t>> different;
  for (const CompletionOutput& completion : output.completions) different.insert(completion.token_ids);
  EXPECT_EQ(different.size(), 4u);
  Request single = request;
  single.sampling.n = 1;
  EXPECT_EQ(engine->generate(single).completions[0].token_ids, output.completions[0].token_ids);
}

TEST_F(ServingTest, PrefixesAreComputedOnce) {
  const auto engine = load({});
  const std::vector<int32_t> prompt = tokens(70);
  const RequestOutput first = engine->generate({prompt, {.max_new_tokens = 5}});
  EXPECT_EQ(first.num_cached_tokens, 0);
  const RequestOutput second = engine->generate({prompt, {.max_new_tokens = 5}});
  EXPECT_EQ(second.num_cached_tokens, 64);
  EXPECT_EQ(completions(second), completions(first));
  std::vector<int32_t> other(prompt);
  other[20] ^= 1;
  EXPECT_EQ(engine->generate({other, {.max_new_tokens = 5}}).num_cached_tokens, 16);
  // The last token is computed again, since its logits are wanted.
  EXPECT_EQ(engine->generate({tokens(64), {.max_new_tokens = 5}}).num_cached_tokens, 48);

  const auto without = load({.enable_prefix_caching = false});
  EXPECT_EQ(completions(without->generate({prompt, {.max_new_tokens = 5}})), completions(first));
  EXPECT_EQ(without->generate({prompt, {.max_new_tokens = 5}}).num_cached_tokens, 0);
}

TEST_F(ServingTest, PrefixesOfRequestsThatComeTogetherAreComputedOnce) {
  const auto alone = load({}), engine = load({.max_num_batched_tokens = 40});
  std::map<RequestId, Request> requests;
  for (int32_t i = 0; i < 5; ++i) {
    Request request = {tokens(70), {.max_new_tokens = 5}};
    for (int32_t own = 0; own <= i; ++own) request.prompt_token_ids.push_back(i);
    requests[engine->add_request(request)] = request;
  }
  std::map<RequestId, Completions> texts;
  std::map<RequestId, int64_t> cached;
  while (engine->has_unfinished()) {
    const std::vector<StepOutput> outputs = engine->step();
    collect(texts, outputs);
    for (const StepOutput& output : outputs) cached[output.request_id] = output.num_cached_tokens;
  }
  EXPECT_EQ(cached, (std::map<RequestId, int64_t>{{1, 0}, {2, 64}, {3, 64}, {4, 64}, {5, 64}}));
  for (const auto& [id, request] : requests) EXPECT_EQ(texts[id], completions(alone->generate(request))) << id;
}

TEST_F(ServingTest, DecodingGoesOnBesideALongPrompt) {
  const auto engine = load({.max_num_batched_tokens = 8});
  const RequestId decoding = engine->add_request({tokens(4), {.max_new_tokens = 30}});
  ASSERT_EQ(engine->step().size(), 1u);
  engine->add_request({tokens(80, 1), {.max_new_tokens = 2}});
  for (int step = 0; step < 11; ++step) {  // 7 tokens of the prompt a step
    const std::vector<StepOutput> outputs = engine->step();
    ASSERT_EQ(outputs.size(), 1u) << step;
    EXPECT_EQ(outputs[0].request_id, decoding);
  }
  EXPECT_EQ(engine->step().size(), 2u);
}

TEST_F(ServingTest, ShortRequestsDoNotPassOneThatWaits) {
  const auto engine = load({.num_kv_blocks = 6});
  engine->add_request({tokens(30), {.max_new_tokens = 30}});
  engine->step();
  const RequestId large = engine->add_request({tokens(80, 2), {.max_new_tokens = 5}});
  std::vector<RequestId> order;
  for (int step = 0; step < 200 && engine->has_unfinished(); ++step) {
    if (step < 60) engine->add_request({tokens(2, step), {.max_new_tokens = 2}});
    for (const StepOutput& output : engine->step()) {
      if (output.finish_reason) order.push_back(output.request_id);
    }
  }
  ASSERT_GE(order.size(), 2u);
  const auto place = std::ranges::find(order, large) - order.begin();
  EXPECT_LE(place, 6) << "it was overtaken by those that fit beside the first one";
}

TEST_F(ServingTest, LowerPrioritiesRunFirstAndTakeTheBlocks) {
  const auto alone = load({}), engine = load({.num_kv_blocks = 6});
  const Request patient = {tokens(60), {.max_new_tokens = 20}, 5}, urgent = {tokens(50, 3), {.max_new_tokens = 20}, -1};
  const RequestId first = engine->add_request(patient);
  std::map<RequestId, Completions> texts;
  for (int i = 0; i < 5; ++i) collect(texts, engine->step());
  EXPECT_EQ(texts[first][0].size(), 5u);
  const RequestId second = engine->add_request(urgent);
  collect(texts, engine->step());
  EXPECT_EQ(texts[first][0].size(), 5u);
  EXPECT_EQ(texts[second][0].size(), 1u);
  EXPECT_EQ(engine->stats().num_preemptions, 1);
  while (engine->has_unfinished()) collect(texts, engine->step());
  EXPECT_EQ(texts[first], completions(alone->generate(patient)));
  EXPECT_EQ(texts[second], completions(alone->generate(urgent)));
}

TEST_F(ServingTest, LowerPrioritiesTakeTheTokensOfAStep) {
  const auto engine = load({.max_num_seqs = 2, .max_num_batched_tokens = 2});
  for (int64_t i = 0; i < 2; ++i) engine->add_request({tokens(2, i), {.max_new_tokens = 60, .ignore_eos = true}, 5});
  for (int i = 0; i < 4; ++i) engine->step();
  const RequestId urgent = engine->add_request({tokens(2, 7), {.max_new_tokens = 3, .ignore_eos = true}, -1});
  std::map<RequestId, Completions> texts;
  for (int i = 0; i < 4; ++i) collect(texts, engine->step());
  EXPECT_EQ(texts[urgent][0].size(), 3u);
  EXPECT_GT(engine->stats().num_preemptions, 0);
}

// Of those with the priority of a request that lost its blocks, who runs goes on, and nobody begins before it.
TEST_F(ServingTest, APreemptedRequestIsNotOvertakenAndBlocksNobody) {
  const auto engine = load({.threads = 1, .max_num_batched_tokens = 70, .num_kv_blocks = 7});
  const auto request = [](int64_t prompt, int64_t from, int64_t max_new_tokens, int64_t priority) {
    Request request;
    request.prompt_token_ids = tokens(prompt, from);
    request.sampling.max_new_tokens = max_new_tokens;
    request.sampling.ignore_eos = true;
    request.priority = priority;
    return request;
  };
  const Request first = request(64, 1, 24, 1), second = request(64, 2, 6, 1), urgent = request(40, 3, 3, 0);
  const auto alone = load({.threads = 1});
  std::map<RequestId, Completions> texts, expected;
  const RequestId a = engine->add_request(first);
  collect(texts, engine->step());
  const RequestId b = engine->add_request(second);
  collect(texts, engine->step());
  const RequestId c = engine->add_request(urgent);
  for (int step = 0; engine->has_unfinished(); ++step) {
    ASSERT_LT(step, 200);
    collect(texts, engine->step());
  }
  expected[a] = completions(alone->generate(first));
  expected[b] = completions(alone->generate(second));
  expected[c] = completions(alone->generate(urgent));
  EXPECT_EQ(texts, expected);
  EXPECT_GT(engine->stats().num_preemptions, 0);
}

TEST_F(ServingTest, OneCompletionEndsAlone) {
  const auto alone = load({}), engine = load({});
  const Request request = {tokens(20), {.n = 3, .max_new_tokens = 20, .temperature = 1.0f}};
  const RequestId id = engine->add_request(request);
  std::map<RequestId, Completions> texts;
  for (int i = 0; i < 5; ++i) collect(texts, engine->step());
  engine->abort(id, 0);
  engine->abort(id, 0);  // nothing happens
  while (engine->has_unfinished()) collect(texts, engine->step());
  const Completions expected = completions(alone->generate(request));
  EXPECT_EQ(texts[id][0].size(), 5u);
  EXPECT_EQ(texts[id][1], expected.at(1));
  EXPECT_EQ(texts[id][2], expected.at(2));
}

TEST_F(ServingTest, RefusesWhatTheCacheCannotHold) {
  const auto engine = load({.num_kv_blocks = 3});
  const auto refusal = [&](const std::function<void()>& call) { return invalid_message(call, ""); };
  EXPECT_EQ(refusal([&] { engine->add_request({tokens(40), {.max_new_tokens = 20}}); }),
            "prompt_token_ids: 40 tokens and max_new_tokens (20) need 4 blocks of the KV cache, which has 3");
  EXPECT_EQ(refusal([&] { engine->logits(tokens(49)); }),
            "token_ids: 49 tokens need 4 blocks of the KV cache, which has 3");
  engine->add_request({tokens(40), {.max_new_tokens = 9}});  // the last token needs no place
  EXPECT_EQ(refusal([&] { engine->generate({tokens(2), {}}); }), "generate: requests of add_request are unfinished");
  EXPECT_EQ(run(*engine).begin()->second[0].size(), 9u);
}

TEST_F(ServingTest, MaskedTokensAreNeverChosen) {
  const auto engine = load({});
  // Even tokens only, then none at all.
  Request request = {tokens(10), {.max_new_tokens = 50, .temperature = 5.0f}};
  request.token_mask = [](int64_t, std::span<const int32_t> generated, std::span<uint32_t> allowed) {
    ASSERT_EQ(allowed.size(), 2u);
    if (generated.size() < 20) std::ranges::fill(allowed, 0x55555555u);
  };
  const CompletionOutput output = engine->generate(request).completions[0];
  EXPECT_EQ(output.token_ids.size(), 20u);
  EXPECT_EQ(output.finish_reason, FinishReason::kStop);
  for (const int32_t token : output.token_ids) EXPECT_EQ(token % 2, 0);
}

TEST_F(ServingTest, AFailingMaskLeavesTheEngineAsItWas) {
  const auto alone = load({}), engine = load({});
  const Request good = {tokens(10), {.max_new_tokens = 10}};
  Request bad = good;
  bad.token_mask = [](int64_t, std::span<const int32_t> generated, std::span<uint32_t> allowed) {
    if (generated.size() == 3) throw std::runtime_error("no grammar");
    std::ranges::fill(allowed, ~0u);
  };
  const RequestId fine = engine->add_request(good), broken = engine->add_request(bad);
  std::map<RequestId, Completions> texts;
  for (int i = 0; i < 3; ++i) collect(texts, engine->step());
  EXPECT_THROW(engine->step(), std::runtime_error);
  EXPECT_THROW(engine->step(), std::runtime_error);
  engine->abort(broken);
  while (engine->has_unfinished()) collect(texts, engine->step());
  EXPECT_EQ(texts[fine], completions(alone->generate(good)));
  EXPECT_THROW(engine->generate(bad), std::runtime_error);
  EXPECT_FALSE(engine->has_unfinished());
  EXPECT_EQ(engine->stats().num_free_kv_blocks, engine->stats().num_kv_blocks);
}

TEST_F(ServingTest, LogprobsAreThoseOfTheLogits) {
  const auto engine = load({.max_num_batched_tokens = 16});
  const std::vector<int32_t> prompt = tokens(40);
  const Request request = {prompt,
                           {.max_new_tokens = 6, .repetition_penalty = 1.5f, .logprobs = 3, .prompt_logprobs = 2}};
  const RequestOutput output = engine->generate(request);
  std::vector<int32_t> all = prompt;
  const CompletionOutput& completion = output.completions[0];
  all.insert(all.end(), completion.token_ids.begin(), completion.token_ids.end());
  const std::vector<float> logits = engine->logits(all);
  std::vector<PositionLogprobs> given = output.prompt_logprobs;
  given.insert(given.end(), completion.logprobs.begin(), completion.logprobs.end());
  ASSERT_EQ(given.size(), all.size() - 1);
  for (size_t t = 0; t + 1 < all.size(); ++t) {
    const float* row = logits.data() + t * 61;
    double sum = 0;
    for (int64_t v = 0; v < 61; ++v) sum += std::exp(static_cast<double>(row[v]));
    std::vector<int32_t> order(61);
    for (int32_t v = 0; v < 61; ++v) order[v] = v;
    std::ranges::stable_sort(order, std::greater{}, [&](int32_t v) { return row[v]; });
    const PositionLogprobs& position = given[t];
    EXPECT_EQ(position.chosen.token_id, all[t + 1]);
    // The sum of 61 exponentials in fp32, and the difference of two numbers of up to about 20.
    EXPECT_NEAR(position.chosen.logprob, row[all[t + 1]] - std::log(sum), 2e-5);
    EXPECT_EQ(order[position.rank - 1], all[t + 1]);
    ASSERT_EQ(position.top.size(), t + 1 < prompt.size() ? 2u : 3u);
    for (size_t i = 0; i < position.top.size(); ++i) {
      EXPECT_EQ(position.top[i].token_id, order[i]);
      EXPECT_NEAR(position.top[i].logprob, row[order[i]] - std::log(sum), 2e-5);
    }
  }
}

}  // namespace
}  // namespace coterie
