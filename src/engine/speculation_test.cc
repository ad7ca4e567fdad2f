#include "engine/speculation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "engine/prompt_lookup.h"
#include "kernels/quantized.h"
#include "model/test_model.h"

namespace coterie {
namespace {

using Ids = std::vector<int32_t>;

Ids found(const Ids& ids, int64_t shortest, int64_t longest, int64_t num_tokens) {
  const auto span = look_up(ids, shortest, longest, num_tokens);
  return {span.begin(), span.end()};
}

TEST(PromptLookup, TakesTheLongestRunThenTheLatest) {
  EXPECT_EQ(found({1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3}, 1, 3, 4), (Ids{4, 9, 2, 3}));  // 1 2 3 once
  EXPECT_EQ(found({1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3}, 1, 2, 4), (Ids{5, 1, 2, 3}));  // 2 3 twice
  EXPECT_EQ(found({7, 8, 7, 8, 7}, 1, 4, 3), (Ids{8, 7}));                          // 7 8 7 overlaps itself
  EXPECT_EQ(found({1, 2, 3, 4, 3}, 2, 3, 4), Ids{});
  EXPECT_EQ(found({5}, 1, 3, 4), Ids{});
  EXPECT_EQ(found({1, 2, 1}, 1, 3, 0), Ids{});
}

// Against one that compares all runs of all lengths, on texts of few letters.
TEST(PromptLookup, EqualsASlowSearch) {
  std::mt19937 random(1);
  const auto slow = [](const Ids& ids, size_t shortest, size_t longest) -> size_t {
    for (size_t n = std::min(longest, ids.size() - 1); n >= shortest; --n) {
      for (size_t end = ids.size() - 1; end >= n; --end) {
        if (std::equal(ids.end() - n, ids.end(), ids.begin() + end - n)) return end;
      }
    }
    return ids.size();
  };
  for (int i = 0; i < 2000; ++i) {
    Ids ids(1 + random() % 30);
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % 3);
    const size_t shortest = 1 + random() % 3, longest = shortest + random() % 4;
    EXPECT_EQ(found(ids, shortest, longest, 100), Ids(ids.begin() + slow(ids, shortest, longest), ids.end()));
  }
}

// Sizes as of a model of a billion parameters; without experts, a dense one.
ModelConfig large_config(int64_t num_experts, int64_t top_k) {
  ModelConfig config;
  config.vocab_size = 50304, config.hidden_size = 1024;
  config.num_heads = config.num_kv_heads = 16, config.head_dim = 64;
  config.max_position_embeddings = 2048, config.tie_word_embeddings = false;
  LayerConfig layer;
  layer.intermediate_size = num_experts == 0 ? 4096 : 0;
  layer.expert_intermediate_size = num_experts == 0 ? 0 : 512;
  layer.router.num_experts = num_experts, layer.router.top_k = top_k;
  config.layers.assign(16, layer);
  return config;
}

StepCost cost_of(int64_t num_experts, int64_t top_k, const std::string& dtype = "bf16") {
  return StepCost(large_config(num_experts, top_k), weight_types(dtype));
}

TEST(StepCost, CountsTheBytesOfTheWeights) {
  const double attention = 16 * 4 * 1024.0 * 1024, head = 50304 * 1024.0, mlp = 16 * 3 * 4096 * 1024.0;
  const double norms = (2 * 16 + 1) * 1024;
  for (const int64_t t : {1, 5, 100}) {
    EXPECT_DOUBLE_EQ(cost_of(0, 0).bytes(t), 2 * (attention + head + mlp) + 4 * norms);
    EXPECT_DOUBLE_EQ(cost_of(0, 0, "fp32").bytes(t), 4 * (attention + head + mlp + norms));
    // Codes of 4 bits and two numbers of 8 for every 32; the head has 8 bits and one number of 16 for every 64.
    EXPECT_DOUBLE_EQ(cost_of(0, 0, "int4").bytes(t), 0.5625 * (attention + mlp) + (1 + 2 / 64.0) * head + 4 * norms);
  }
  // One token reads K experts, very many read all.
  const double router = 16 * 64 * 1024 * 4, expert = 16 * 3 * 512 * 1024.0 * 2;
  const double rest = 2 * (attention + head) + 4 * norms + router;
  EXPECT_NEAR(cost_of(64, 8).bytes(1), rest + 8 * expert, 1);
  EXPECT_NEAR(cost_of(64, 8).bytes(2), rest + 15 * expert, 1);
  EXPECT_NEAR(cost_of(64, 8).bytes(1000), rest + 64 * expert, 1);
}

TEST(StepCost, ExpertsInFourBitsOfTheirFileCostWhatTheyWeigh) {
  NativeThreadPool pool(1);
  const QuantizedMatrix codes(PanelType::kMxfp4, 4, 32);
  ModelWeights weights;
  weights.layers.resize(2);
  const WeightTypes wanted = weight_types("bf16");
  EXPECT_EQ(types_in_memory(wanted, weights).experts, PanelType::kBF16);
  weights.layers[1].experts.up_E.emplace_back(codes.view(), pool);
  EXPECT_EQ(types_in_memory(wanted, weights).experts, PanelType::kMxfp4);
  EXPECT_EQ(types_in_memory(wanted, weights).attention, PanelType::kBF16);
}

// Expected experts, against draws.
TEST(StepCost, ExpertsOfSeveralTokensAreThoseOfRandomOnes) {
  const StepCost cost = cost_of(64, 8);
  const double expert = 16 * 3 * 512 * 1024.0 * 2, rest = cost.bytes(1) - 8 * expert;
  std::mt19937 random(5);
  double sum = 0;
  constexpr int kDraws = 4000, kTokens = 6;
  for (int draw = 0; draw < kDraws; ++draw) {
    std::vector<bool> needed(64, false);
    for (int t = 0; t < kTokens; ++t) {
      std::vector<int> experts(64);
      for (int e = 0; e < 64; ++e) experts[e] = e;
      std::ranges::shuffle(experts, random);
      for (int k = 0; k < 8; ++k) needed[experts[k]] = true;
    }
    sum += std::ranges::count(needed, true);
  }
  // A draw's deviation is below sqrt(64) / 2, were they independent; that they aren't makes it smaller.
  EXPECT_NEAR((cost.bytes(kTokens) - rest) / expert, sum / kDraws, 5 * 4 / std::sqrt(kDraws));
}

TEST(StepCost, FitsWhatWasMeasured) {
  StepCost cost = cost_of(64, 8);
  const double a = 3e-11, b = 2e-4;
  const auto measured = [&](int64_t t) { return a * cost_of(64, 8).bytes(t) + b * static_cast<double>(t); };
  cost.fit(measured(1), 8, measured(8));
  for (const int64_t t : {1, 3, 8, 100}) EXPECT_NEAR(cost.seconds(t), measured(t), 1e-9 * measured(t));
  cost.fit(0.01, 8, 0.005);  // more tokens in less time: noise
  EXPECT_NEAR(cost.seconds(1), 0.01, 1e-12);
  EXPECT_GE(cost.seconds(2), cost.seconds(1));
  cost.fit(0.01, 8, 1.0);  // worse than one by one
  EXPECT_NEAR(cost.seconds(4), 0.04, 1e-12);
}

int64_t depth_of_one(const StepCost& cost, double acceptance, const StepCost* draft = nullptr) {
  return choose_depths(std::vector<Guessable>{{acceptance, 8}}, 1, 1, cost, draft)[0];
}

TEST(ChooseDepths, DeepWhereTokensAreFreeAndOffWhereEachReadsItsOwnExperts) {
  const StepCost dense = cost_of(0, 0), moe = cost_of(64, 8);
  EXPECT_EQ(depth_of_one(dense, 0.9), 8);
  EXPECT_EQ(depth_of_one(dense, 0.1), 8);  // as long as computing is free
  EXPECT_EQ(depth_of_one(moe, 0.3), 0);
  EXPECT_EQ(depth_of_one(moe, 0.5), 0);
  EXPECT_GE(depth_of_one(moe, 0.9), 3);
  EXPECT_EQ(depth_of_one(moe, 1.0), 8);
  EXPECT_EQ(depth_of_one(dense, 0.0), 0);
}

TEST(ChooseDepths, ComputeAndTheDraftModelCount) {
  StepCost dense = cost_of(0, 0);
  const double second = dense.bytes(1);  // a step takes one, and each token a tenth more
  dense.fit(second, 8, second * 1.7);
  EXPECT_LT(depth_of_one(dense, 0.5), 5);
  EXPECT_GE(depth_of_one(dense, 0.5), 1);
  EXPECT_EQ(depth_of_one(dense, 0.05), 0);
  const StepCost free_tokens = cost_of(0, 0);
  EXPECT_EQ(depth_of_one(free_tokens, 0.9, &free_tokens), 0) << "a draft model as slow as the model";
}

// In a batch that reads all experts anyway, guesses cost little; the likelier completion gets more.
TEST(ChooseDepths, ABatchReadsTheExpertsAnyway) {
  StepCost moe = cost_of(64, 8);
  moe.fit(1.02, 8, moe.bytes(8) / moe.bytes(1) + 8 * 0.02);  // computing a token takes 2 % of reading for one
  EXPECT_EQ(depth_of_one(moe, 0.5), 0);
  std::vector<Guessable> crowd(64, {0.5, 8});
  const std::vector<int64_t> depths = choose_depths(crowd, 64, 64, moe);
  EXPECT_GE(*std::ranges::min_element(depths), 1);
  crowd[5].acceptance = 0.95;
  EXPECT_GT(choose_depths(crowd, 64, 64, moe)[5], choose_depths(crowd, 64, 64, moe)[4]);
  crowd[7].most = 0;
  EXPECT_EQ(choose_depths(crowd, 64, 64, moe)[7], 0);
}

// Of two completions, against all pairs of depths.
TEST(ChooseDepths, GivesTheMostTokensPerSecond) {
  std::mt19937 random(2);
  const auto uniform = [&] { return static_cast<double>(random()) / 4294967296.0; };
  for (int i = 0; i < 200; ++i) {
    StepCost cost = cost_of(64, 1 + random() % 8);
    cost.fit(1, 8, 1 + 7 * uniform());
    const StepCost small = cost_of(0, 0);
    StepCost draft = small;
    draft.fit(0.1 * uniform(), 8, 0.1);
    const bool drafts = random() % 2;
    const std::vector<Guessable> two = {{uniform(), 6}, {uniform(), 4}};
    const auto rate = [&](int64_t first, int64_t second) {
      double gain = 2, seconds = cost.seconds(2 + first + second);
      for (int64_t k = 1; k <= first; ++k) gain += std::pow(two[0].acceptance, k);
      for (int64_t k = 1; k <= second; ++k) gain += std::pow(two[1].acceptance, k);
      for (int64_t level = 0; drafts && level < std::max(first, second); ++level) {
        seconds += draft.seconds((first > level) + (second > level));
      }
      return gain / seconds;
    };
    double best = 0;
    for (int64_t first = 0; first <= 6; ++first) {
      for (int64_t second = 0; second <= 4; ++second) best = std::max(best, rate(first, second));
    }
    const std::vector<int64_t> chosen = choose_depths(two, 2, 2, cost, drafts ? &draft : nullptr);
    // With a draft model, taking the likeliest first is a good choice but not always the best.
    EXPECT_GE(rate(chosen[0], chosen[1]), (drafts ? 0.9 : 1 - 1e-12) * best);
  }
}

// One completion whose text is given, token by token, in steps of a speculator.
class SpeculatorTest : public ::testing::Test {
 protected:
  SpeculatorTest() {
    shared_->id = 1;
    for (int32_t i = 0; i < 32; ++i) shared_->request.prompt_token_ids.push_back(i % 8);
    shared_->request.sampling.max_new_tokens = 500;
    shared_->max_model_len = 1000;
    auto sequence = std::make_unique<Sequence>(shared_, 0, cache_);
    sequence_ = sequence.get();
    scheduler_.add(std::move(sequence));
  }

  // A step; how many guesses it computed. next(position) is the token that is chosen.
  template <typename Next>
  int64_t step(const Next& next) {
    std::vector<ScheduledChunk> chunks = scheduler_.schedule();
    speculator_.propose(chunks, scheduler_);
    const std::vector<int32_t>& proposal = chunks.at(0).proposal;
    size_t right = 0;
    for (;; ++right) {
      sequence_->append(next(sequence_->num_tokens()));
      if (right == proposal.size() || proposal[right] != sequence_->token_ids().back()) break;
    }
    sequence_->computed(chunks[0].num_tokens - static_cast<int64_t>(proposal.size() - right));
    EXPECT_EQ(sequence_->num_pending(), 1);
    return static_cast<int64_t>(proposal.size());
  }

  KvCache cache_{small_config(), DType::kF32, 16, 100};
  Scheduler scheduler_{cache_, {8, 64}};
  std::shared_ptr<SharedRequest> shared_ = std::make_shared<SharedRequest>();
  Sequence* sequence_ = nullptr;
  Speculator speculator_{{SpeculationKind::kPromptLookup, 4, 1, 4, true}, cost_of(64, 8), nullptr};
};

TEST_F(SpeculatorTest, StopsWhereNothingComesTrueAndBeginsAgainWhereItDoes) {
  const auto repeating = [](int64_t position) { return static_cast<int32_t>(position % 8); };
  std::mt19937 random(1);
  const auto surprising = [&](int64_t) { return static_cast<int32_t>(random() % 8); };
  EXPECT_EQ(step(repeating), 0) << "the prompt";
  for (int i = 0; i < 6; ++i) step(repeating);
  EXPECT_EQ(step(repeating), 4);
  int64_t guesses = 0;
  for (int i = 0; i < 10; ++i) step(surprising);
  for (int i = 0; i < 40; ++i) guesses += step(surprising);
  EXPECT_LE(guesses, 4);
  for (int i = 0; i < 20; ++i) step(repeating);
  EXPECT_EQ(step(repeating), 4);
}

TEST_F(SpeculatorTest, GuessesNeverPassTheEnd) {
  shared_->request.sampling.max_new_tokens = 40;
  const auto repeating = [](int64_t position) { return static_cast<int32_t>(position % 8); };
  while (!sequence_->finished()) {
    const int64_t left = sequence_->num_left();
    EXPECT_LT(step(repeating), left);
  }
  EXPECT_EQ(sequence_->output().size(), 40u);
}

}  // namespace
}  // namespace coterie
