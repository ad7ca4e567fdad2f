// Choosing the next token from logits; names, order and meaning as in vLLM. Legend: V vocabulary.
#pragma once

#include <cstdint>
#include <span>

#include "coterie/engine.h"
#include "engine/token_counts.h"

namespace coterie {

// Changes the logits by everything in SamplingParams that comes before temperature. Tokens that may not come next
// become -infinity: those outside allowed (empty: all are allowed), and unless may_end, the end tokens.
struct LogitsChange {
  const SamplingParams& params;
  const TokenCounts& counts;
  std::span<const uint32_t> allowed;  // see TokenMask
  std::span<const int64_t> end_token_ids;
  bool may_end = true;
};
void change_logits(const LogitsChange& change, std::span<float> logits_V);

// Temperature, then min_p, top_k (tokens as likely as the k-th stay) and top_p (the likeliest tokens until their sum
// reaches top_p, the one that reaches it included), then a random choice, keyed by (seed, completion, position) alone,
// so that a sequence has the same continuation alone and in a batch. position is that of the token to choose. A
// temperature below 1e-5 is greedy; greedy ties go to the lower id. Returns kNoToken where every logit is -infinity.
inline constexpr int32_t kNoToken = -1;
int32_t sample(std::span<const float> logits_V, const SamplingParams& params, int64_t completion, int64_t position);

// Of the chosen token and the num_top likeliest, equal ones by id.
PositionLogprobs position_logprobs(std::span<const float> logits_V, int32_t chosen, int64_t num_top);

}  // namespace coterie
