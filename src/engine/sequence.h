// One completion of a request while it runs: its tokens, the part of them that the KV cache holds, and when it ends.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "coterie/engine.h"
#include "engine/kv_cache.h"
#include "engine/token_counts.h"

namespace coterie {

// What the completions of a request share.
struct SharedRequest {
  RequestId id = 0;
  Request request;
  std::vector<int64_t> end_token_ids;  // the model's own, and the request's stop tokens
  int64_t max_model_len = 0;
};

class Sequence {
 public:
  Sequence(std::shared_ptr<SharedRequest> shared, int64_t index, KvCache& cache);  // cache must outlive this

  // Who comes first: lower priorities, then earlier requests.
  std::tuple<int64_t, RequestId, int64_t> rank() const { return {priority(), id(), index_}; }
  bool before(const Sequence& other) const { return rank() < other.rank(); }

  RequestId id() const { return shared_->id; }
  int64_t index() const { return index_; }
  int64_t priority() const { return shared_->request.priority; }
  SharedRequest& shared() { return *shared_; }
  const SamplingParams& sampling() const { return shared_->request.sampling; }
  const TokenCounts& counts() const { return counts_; }

  std::span<const int32_t> token_ids() const { return token_ids_; }  // prompt and output
  std::span<const int32_t> output() const { return token_ids().subspan(num_prompt_tokens_); }
  int64_t num_tokens() const { return static_cast<int64_t>(token_ids_.size()); }
  int64_t num_prompt_tokens() const { return num_prompt_tokens_; }
  int64_t num_computed() const { return num_computed_; }
  int64_t num_pending() const { return num_tokens() - num_computed_; }  // to be computed before the next choice
  int64_t num_cached_tokens() const { return num_cached_tokens_; }
  int64_t num_left() const;  // tokens that may still be appended

  // The tokens it had when it was computed from its start (Batch::add): its prompt, unless it has outgrown the original
  // context of RopeScalingKind::kLongrope since then.
  int64_t start_length() const { return start_length_; }
  // How many tokens may be computed before all of it has to be computed anew.
  int64_t num_alike() const { return cache_.longest_alike(start_length_) - num_computed_; }

  // May its end tokens be chosen next?
  bool may_end() const { return static_cast<int64_t>(output().size()) >= sampling().min_tokens; }
  std::span<const int64_t> end_token_ids() const { return shared_->end_token_ids; }

  // Takes over from the prefix cache what it has of the tokens, but for the last one, whose logits are wanted.
  void adopt_cached_blocks();
  // Whether this one still has to compute blocks that the other, not begun, could take over afterwards.
  bool computes_blocks_of(const Sequence& other) const;
  void reserve(int64_t num_tokens) { blocks_.reserve(num_computed_ + num_tokens); }
  int64_t num_missing_blocks(int64_t num_tokens) const;  // of reserve(num_tokens)
  // So many more of the tokens are in the cache; publishes the blocks that are full now, and gives back those behind.
  // Where all tokens turn otherwise from now on, everything is pending again.
  void computed(int64_t num_tokens);
  void drop_blocks();  // everything is pending again

  void append(int32_t token_id);  // a chosen one
  void finish(FinishReason reason) { finished_ = reason; }
  std::optional<FinishReason> finished() const { return finished_; }
  BlockTable& blocks() { return blocks_; }

  std::vector<PositionLogprobs> prompt_logprobs;  // gathered until the first token is chosen

  // When it came, when a step first took it along, and when it had its first token.
  using Clock = std::chrono::steady_clock;
  void started();
  Timings timings() const;

 private:
  bool may_adopt_blocks() const;

  std::shared_ptr<SharedRequest> shared_;
  int64_t index_;
  KvCache& cache_;
  std::vector<int32_t> token_ids_;
  int64_t num_prompt_tokens_;
  int64_t start_length_;
  TokenCounts counts_;
  int64_t num_computed_ = 0;
  int64_t num_cached_tokens_ = 0;
  std::optional<FinishReason> finished_;
  BlockTable blocks_;
  int64_t num_published_ = 0;  // blocks whose chain has the name prefix_
  KvCache::Prefix prefix_;
  Clock::time_point arrival_ = Clock::now();
  std::optional<Clock::time_point> start_, first_token_;
  Clock::time_point last_token_;
};

}  // namespace coterie
