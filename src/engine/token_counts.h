// How often tokens occur in a completion and its prompt, for the penalties; empty where no penalty asks.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>

#include "coterie/engine.h"

namespace coterie {

class TokenCounts {
 public:
  TokenCounts(const SamplingParams& params, std::span<const int32_t> prompt)
      : counts_(params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0) {
    if (!counts_) return;
    for (const int32_t token : prompt) in_output_.try_emplace(token, 0);
  }

  void add_output(int32_t token) {
    if (counts_) ++in_output_[token];
  }

  // Every token of prompt and output, with how often it is in the output.
  const std::unordered_map<int32_t, int64_t>& in_output() const { return in_output_; }

 private:
  bool counts_;
  std::unordered_map<int32_t, int64_t> in_output_;
};

}  // namespace coterie
