// One request while it runs: its tokens, the part of them that the KV cache holds, and when it ends.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "coterie/engine.h"
#include "engine/kv_cache.h"

namespace coterie {

class Sequence {
 public:
  // end_token_ids: the model's own; the request's stop tokens come on top. cache must outlive this.
  Sequence(const Request& request, std::span<const int64_t> end_token_ids, int64_t max_model_len, KvCache& cache);

  // The tokens whose keys and values are still to be computed, at most `most` of them.
  std::span<const int32_t> pending(int64_t most) const;
  int64_t num_computed() const { return num_computed_; }
  bool prefilled() const { return num_computed_ >= num_prompt_tokens_; }
  void computed(int64_t num_tokens) { num_computed_ += num_tokens; }

  void append(int32_t token_id);  // a sampled one
  std::optional<FinishReason> finished() const { return finished_; }
  void abort() { finished_ = FinishReason::kAborted; }

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids_.size()); }
  std::vector<int32_t> output() const;  // the generated tokens
  const SamplingParams& sampling() const { return sampling_; }
  BlockTable& blocks() { return blocks_; }

 private:
  SamplingParams sampling_;
  std::vector<int64_t> end_token_ids_;
  int64_t max_model_len_;
  std::vector<int32_t> token_ids_;  // prompt and output
  int64_t num_prompt_tokens_;
  int64_t num_computed_ = 0;
  std::optional<FinishReason> finished_;
  BlockTable blocks_;
};

}  // namespace coterie
