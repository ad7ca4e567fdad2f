// The router's random choices: pure functions of (seed, step, layer, global token index), with a stream
// of their own for every purpose. So they depend neither on threads nor on how a batch is cut up.
// Legend: E experts, D hidden.
#pragma once

#include <cstdint>

namespace coterie {

struct RandomKey {
  uint64_t seed = 0;
  uint64_t step = 0;        // below 2^44
  int64_t layer = 0;        // below 2^16
  int64_t first_token = 0;  // global index of token 0; global indices lie below 2^40
};

// Whoever has the lower rank claims a place first; of equal ranks the lower token.
uint32_t random_rank(const RandomKey& key, int64_t token);

// Standard Gumbel noise -log(-log(u)), one value per expert. argmax(logits + noise) is a sample of
// softmax(logits) (Maddison et al. 2017, section 2).
void gumbel_noise(const RandomKey& key, int64_t token, int64_t E, float* noise_E);

// Factors uniform in [1 - epsilon, 1 + epsilon) for the router's input (Switch Transformer, section 2.4).
void jitter_factors(const RandomKey& key, int64_t token, int64_t D, float epsilon, float* factors_D);

}  // namespace coterie
