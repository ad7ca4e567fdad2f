#include "engine/sequence.h"

#include <algorithm>
#include <utility>

namespace coterie {
namespace {

double seconds(Sequence::Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

Sequence::Sequence(std::shared_ptr<SharedRequest> shared, int64_t index, KvCache& cache)
    : shared_(std::move(shared)),
      index_(index),
      cache_(cache),
      token_ids_(shared_->request.prompt_token_ids),
      num_prompt_tokens_(num_tokens()),
      start_length_(num_tokens()),
      counts_(sampling(), token_ids_),
      blocks_(cache),
      prefix_(cache.root(start_length_)) {}

// Logprobs of the prompt need every hidden state.
bool Sequence::may_adopt_blocks() const { return !sampling().prompt_logprobs || index_ > 0 || !output().empty(); }

void Sequence::adopt_cached_blocks() {
  if (!may_adopt_blocks()) return;
  blocks_.trim(num_computed_);
  const int64_t block_size = cache_.block_size();
  while (num_computed_ + block_size < num_tokens()) {
    const auto tokens = token_ids().subspan(num_computed_, block_size);
    const auto cached = cache_.find(prefix_, tokens);
    if (!cached) break;
    blocks_.append(cached->block);
    prefix_ = cached->prefix;
    ++num_published_;
    num_computed_ += block_size;
  }
}

bool Sequence::computes_blocks_of(const Sequence& other) const {
  const bool comparable = cache_.root(start_length_) == cache_.root(other.start_length_);
  if (num_pending() <= 1 || !comparable || !other.may_adopt_blocks()) return false;
  const auto ours = token_ids(), theirs = other.token_ids().first(other.num_tokens() - 1);
  const int64_t common = std::ranges::mismatch(ours, theirs).in1 - ours.begin();
  return common / cache_.block_size() > num_computed_ / cache_.block_size();
}

int64_t Sequence::num_left() const {
  return std::min(sampling().max_new_tokens - static_cast<int64_t>(output().size()),
                  shared_->max_model_len - num_tokens());
}

int64_t Sequence::num_missing_blocks(int64_t num_tokens) const {
  return std::max<int64_t>(cache_.blocks_for(num_computed_ + num_tokens) - blocks_.num_blocks(), 0);
}

void Sequence::computed(int64_t num_tokens) {
  num_computed_ += num_tokens;
  blocks_.trim(num_computed_);
  const int64_t block_size = cache_.block_size();
  for (; (num_published_ + 1) * block_size <= num_computed_; ++num_published_) {
    const auto tokens = token_ids().subspan(num_published_ * block_size, block_size);
    prefix_ = cache_.publish(prefix_, tokens, blocks_.block(num_published_));
  }
  if (this->num_tokens() <= cache_.longest_alike(start_length_)) return;
  start_length_ = this->num_tokens();
  drop_blocks();
}

void Sequence::drop_blocks() {
  blocks_.clear();
  num_computed_ = num_published_ = 0;
  prefix_ = cache_.root(start_length_);
  prompt_logprobs.clear();
}

void Sequence::append(int32_t token_id) {
  token_ids_.push_back(token_id);
  counts_.add_output(token_id);
  last_token_ = Clock::now();
  if (!first_token_) first_token_ = last_token_;
  if (std::ranges::find(end_token_ids(), token_id) != end_token_ids().end()) {
    finished_ = FinishReason::kStop;
  } else if (num_left() <= 0) {
    finished_ = FinishReason::kLength;
  }
}

void Sequence::started() {
  if (start_) return;
  start_ = Clock::now();
  num_cached_tokens_ = num_computed_;
}

Timings Sequence::timings() const {
  if (!start_ || !first_token_) return {};
  return {seconds(*start_ - arrival_), seconds(*first_token_ - *start_), seconds(last_token_ - *first_token_)};
}

}  // namespace coterie
