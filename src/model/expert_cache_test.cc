#include "model/expert_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "model/test_model.h"

namespace coterie {
namespace {

constexpr int64_t kExperts = 6;

// Two layers of experts around one without.
ModelWeights some_weights(NativeThreadPool& pool) {
  ModelWeights weights;
  for (int layer = 0; layer < 3; ++layer) {
    LayerWeights& w = weights.layers.emplace_back();
    if (layer == 1) continue;
    const std::vector<float> up = random_values(kExperts * 8 * 20, layer, 1),
                             down = random_values(kExperts * 20 * 4, layer, 1);
    const ExpertShape shape = {.num_experts = kExperts, .hidden_size = 20, .intermediate_size = 4};
    w.experts = PackedExperts(shape, {.up_EUD = up.data(), .down_EDF = down.data()}, pool);
  }
  return weights;
}

std::vector<int64_t> offsets_of(const std::vector<int>& chosen) {
  std::vector<int64_t> offsets = {0};
  for (int e = 0; e < kExperts; ++e) offsets.push_back(offsets.back() + std::ranges::count(chosen, e));
  return offsets;
}

bool same_panels(const ModelWeights& a, const ModelWeights& b) {
  const auto same = [](const PackedMatrix& x, const PackedMatrix& y) {
    return x.bytes() == y.bytes() && std::memcmp(x.data(), y.data(), x.bytes()) == 0;
  };
  for (size_t n = 0; n < a.layers.size(); ++n) {
    const PackedExperts &x = a.layers[n].experts, &y = b.layers[n].experts;
    for (size_t e = 0; e < x.up_E.size(); ++e) {
      if (!same(x.up_E[e], y.up_E[e]) || !same(x.down_E[e], y.down_E[e])) return false;
    }
  }
  return true;
}

TEST(ExpertCache, ExpertsAreTheSameWhereverTheyLie) {
  NativeThreadPool pool(1);
  const ModelWeights original = some_weights(pool);
  for (const size_t bytes : {size_t{0}, size_t{3000}, size_t{10000}, size_t{1} << 20}) {
    ModelWeights weights = some_weights(pool);
    ExpertCache cache(weights, bytes);
    std::mt19937 random(5);
    for (int step = 0; step < 500; ++step) {
      const int first = static_cast<int>(random() % kExperts), second = static_cast<int>(random() % 2);
      cache.use(step % 2 * 2, offsets_of({first, second}));
      ASSERT_TRUE(same_panels(weights, original)) << step;
      ASSERT_LE(cache.stats().held, cache.stats().capacity);
    }
    EXPECT_LE(cache.stats().capacity, 2 * kExperts);
    EXPECT_EQ(cache.stats().hits > 0, cache.stats().capacity > 0);
  }
}

TEST(ExpertCache, HoldsWhatIsChosenMost) {
  NativeThreadPool pool(1);
  ModelWeights weights = some_weights(pool);
  const size_t one = weights.layers[0].experts.up_E[0].bytes() + weights.layers[0].experts.down_E[0].bytes() + 128;
  ExpertCache cache(weights, 2 * one);
  const auto hits_of = [&](int expert) {
    const int64_t before = cache.stats().hits;
    cache.use(0, offsets_of({expert}));
    return cache.stats().hits - before;
  };
  for (int i = 0; i < 20; ++i) cache.use(0, offsets_of({3, 4}));
  EXPECT_EQ(hits_of(3), 1);
  EXPECT_EQ(hits_of(0), 0);
  EXPECT_EQ(hits_of(0), 0);  // chosen less: it does not push out the others
  EXPECT_EQ(hits_of(4), 1);
  for (int i = 0; i < 60; ++i) cache.use(0, offsets_of({0, 1}));
  EXPECT_EQ(hits_of(0), 1);  // now it is the one that is chosen
  EXPECT_EQ(hits_of(3), 0);
}

}  // namespace
}  // namespace coterie
