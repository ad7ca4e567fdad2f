#include "moe/router_random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "base/philox.h"

namespace coterie {
namespace {

const RandomKey kKey = {.seed = 5, .step = 9, .layer = 2, .first_token = 100};

TEST(RouterRandom, TheCounterIsStreamLayerStepTokenAndBlock) {
  // What the tests in Python rebuild.
  const uint64_t rest = uint64_t{2} << 44 | 9;
  EXPECT_EQ(random_rank(kKey, 3), philox(5, uint64_t{1} << 60 | rest, uint64_t{103} << 24)[0]);
  float noise[6], factors[6];
  gumbel_noise(kKey, 3, 6, noise);
  const uint32_t word = philox(5, uint64_t{2} << 60 | rest, uint64_t{103} << 24 | 1)[1];
  EXPECT_EQ(noise[5], static_cast<float>(-std::log(-std::log(((word >> 8) + 0.5) / (1 << 24)))));
  jitter_factors(kKey, 3, 6, 0.25f, factors);
  const uint32_t other = philox(5, uint64_t{3} << 60 | rest, uint64_t{103} << 24 | 1)[1];
  EXPECT_FLOAT_EQ(factors[5], 0.75f + 0.5f * static_cast<float>(other >> 8) / (1 << 24));
}

TEST(RouterRandom, NoTwoStreamsMeet) {
  std::set<uint32_t> words;
  for (uint64_t step : {1, 2}) {
    for (int64_t layer : {0, 1}) {
      for (int64_t token = 0; token < 50; ++token) {
        words.insert(random_rank({.seed = 5, .step = step, .layer = layer}, token));
      }
    }
  }
  EXPECT_EQ(words.size(), 200u);
}

// Mean gamma = 0.5772, variance pi^2 / 6, each within five standard errors of n values; the variance
// of a square is below 4.4 variances squared (kurtosis 5.4).
TEST(RouterRandom, GumbelNoise) {
  const int64_t n = 1 << 16;
  std::vector<float> noise(n);
  gumbel_noise(kKey, 0, n, noise.data());
  const double mean = 0.577215665, variance = M_PI * M_PI / 6;
  double sum = 0, squares = 0;
  for (float value : noise) {
    ASSERT_TRUE(std::isfinite(value));
    sum += value;
    squares += (value - mean) * (value - mean);
  }
  EXPECT_NEAR(sum / n, mean, 5 * std::sqrt(variance / n));
  EXPECT_NEAR(squares / n, variance, 5 * variance * std::sqrt(4.4 / n));
}

TEST(RouterRandom, JitterFactors) {
  const int64_t n = 1 << 14;
  std::vector<float> factors(n);
  jitter_factors(kKey, 0, n, 0.01f, factors.data());
  double sum = 0;
  for (float factor : factors) {
    ASSERT_GE(factor, 0.99f);
    ASSERT_LE(factor, 1.01f);
    sum += factor - 1.0;
  }
  EXPECT_NEAR(sum / n, 0.0, 5 * 0.01 / std::sqrt(3.0 * n));
}

}  // namespace
}  // namespace coterie
