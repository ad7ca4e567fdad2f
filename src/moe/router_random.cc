#include "moe/router_random.h"

#include <algorithm>
#include <cmath>

#include "base/philox.h"

namespace coterie {
namespace {

enum class Stream : uint64_t { kRank = 1, kGumbel = 2, kJitter = 3 };

constexpr int64_t kWords = 4;  // that one Philox block gives

// Block `block` of a token's stream. The stream's number in the highest bits keeps clear of every
// other use of the seed (first weights, order of the data).
std::array<uint32_t, 4> random_words(const RandomKey& key, Stream stream, int64_t token, int64_t block) {
  const uint64_t high = static_cast<uint64_t>(stream) << 60 | static_cast<uint64_t>(key.layer) << 44 | key.step;
  const uint64_t low = static_cast<uint64_t>(key.first_token + token) << 24 | static_cast<uint64_t>(block);
  return philox(key.seed, high, low);
}

// Calls body(i, word) for i in [0, n).
template <typename Body>
void for_each_word(const RandomKey& key, Stream stream, int64_t token, int64_t n, const Body& body) {
  for (int64_t first = 0; first < n; first += kWords) {
    const auto words = random_words(key, stream, token, first / kWords);
    for (int64_t i = first; i < std::min(n, first + kWords); ++i) body(i, words[i - first]);
  }
}

}  // namespace

uint32_t random_rank(const RandomKey& key, int64_t token) { return random_words(key, Stream::kRank, token, 0)[0]; }

void gumbel_noise(const RandomKey& key, int64_t token, int64_t E, float* noise_E) {
  for_each_word(key, Stream::kGumbel, token, E, [&](int64_t e, uint32_t word) {
    const double uniform = (static_cast<double>(word >> 8) + 0.5) * 0x1.0p-24;  // neither 0 nor 1
    noise_E[e] = static_cast<float>(-std::log(-std::log(uniform)));
  });
}

void jitter_factors(const RandomKey& key, int64_t token, int64_t D, float epsilon, float* factors_D) {
  for_each_word(key, Stream::kJitter, token, D, [&](int64_t i, uint32_t word) {
    const float uniform = static_cast<float>(word >> 8) * 0x1.0p-24f;
    factors_D[i] = 1.0f + epsilon * (2.0f * uniform - 1.0f);
  });
}

}  // namespace coterie
