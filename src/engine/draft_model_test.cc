#include "engine/draft_model.h"

#include <gtest/gtest.h>

#include "io/test_files.h"
#include "model/test_model.h"

namespace coterie {
namespace {

// What it has seen of texts that went on otherwise makes no difference, nor what it has seen of shorter ones: it says
// what it would say alone.
TEST_F(TemporaryDirectoryTest, DraftModelGuessesAsIfItSawATextForTheFirstTime) {
  for (const ModelConfig& config : {small_config(), longrope_config()}) {
    write_random_model(directory(), config);
    NativeThreadPool pool(1);
    const EngineOptions options = {
        .block_size = 16, .num_kv_blocks = 12, .speculation = "draft", .draft_model = directory().string()};
    const EngineSettings settings = engine_settings(options, StoredModel(directory().string()));
    DraftModel model(options, settings, 61, pool);
    const auto alone = Engine::load(directory().string());
    KvCache cache(small_config(), DType::kF32, 16, 12);
    const auto shared = std::make_shared<SharedRequest>();
    for (int32_t i = 0; i < 40; ++i) shared->request.prompt_token_ids.push_back((i * i + 3) % 61);
    shared->request.sampling.max_new_tokens = 50;
    shared->max_model_len = 96;
    Sequence sequence(shared, 0, cache);

    const auto draft = model.begin();
    for (int32_t step = 0; step < 8; ++step) {
      std::vector<int32_t> guess, expected;
      const auto fresh = model.begin();
      model.guess(std::vector<DraftTask>{{&sequence, draft.get(), 4, &guess}, {&sequence, fresh.get(), 4, &expected}});
      ASSERT_EQ(guess.size(), 4u);
      EXPECT_EQ(guess, expected) << step;
      const std::vector<int32_t> text(sequence.token_ids().begin(), sequence.token_ids().end());
      EXPECT_EQ(guess, alone->generate({text, {.max_new_tokens = 4}}).completions[0].token_ids) << step;
      sequence.append(guess[0]);
      for (int32_t i = 0; i < 4; ++i) sequence.append((guess[1] + 1 + i) % 61);  // the second one was wrong
    }
  }
}

TEST_F(TemporaryDirectoryTest, DraftModelGuessesNothingWithoutRoom) {
  write_random_model(directory(), small_config());
  NativeThreadPool pool(1);
  const EngineOptions options = {
      .block_size = 16, .num_kv_blocks = 3, .speculation = "draft", .draft_model = directory().string()};
  DraftModel model(options, engine_settings(options, StoredModel(directory().string())), 61, pool);
  KvCache cache(small_config(), DType::kF32, 16, 6);
  const auto shared = std::make_shared<SharedRequest>();
  shared->request.prompt_token_ids.assign(30, 5);
  Sequence one(shared, 0, cache), two(shared, 1, cache);
  const auto first = model.begin(), second = model.begin();
  std::vector<int32_t> guess_one, guess_two;
  model.guess(std::vector<DraftTask>{{&one, first.get(), 3, &guess_one}, {&two, second.get(), 3, &guess_two}});
  EXPECT_EQ(guess_one.size(), 3u);  // two blocks of three
  EXPECT_TRUE(guess_two.empty());
}

}  // namespace
}  // namespace coterie
