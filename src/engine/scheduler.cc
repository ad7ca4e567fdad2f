#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace coterie {
namespace {

bool in_order(const std::unique_ptr<Sequence>& a, const std::unique_ptr<Sequence>& b) { return a->before(*b); }

}  // namespace

std::vector<int32_t> ScheduledChunk::token_ids() const {
  const auto known = sequence->token_ids().subspan(sequence->num_computed()).first(num_tokens - proposal.size());
  std::vector<int32_t> ids(known.begin(), known.end());
  ids.insert(ids.end(), proposal.begin(), proposal.end());
  return ids;
}

void Scheduler::add(std::unique_ptr<Sequence> sequence) { insert(waiting_, std::move(sequence)); }

std::vector<ScheduledChunk> Scheduler::schedule() {
  chunks_.clear();
  budget_ = limits_.max_num_batched_tokens;
  first_preempted_ = nullptr;
  const Sequence* stalled = decode();
  bool closed = false;  // to those who wait: one of them did not fit
  for (Sequence* sequence : prefilling()) {
    if (stalled && stalled->before(*sequence)) break;
    const bool waits = !is_running(*sequence), begins = sequence->num_computed() == 0;
    if ((waits && closed) || (begins && waits_for_blocks(*sequence))) continue;
    if (!take_budget(*sequence)) break;
    if (waits) closed = (first_preempted_ && first_preempted_->before(*sequence)) || !admit(*sequence);
    if (waits && closed) continue;
    if (begins && !waits) sequence->adopt_cached_blocks();  // it has outgrown the original context
    const int64_t num_tokens = std::min(budget_, sequence->num_pending());
    if (!make_room(*sequence, num_tokens)) break;
    add_chunk(*sequence, num_tokens);
  }
  COTERIE_CHECK(!chunks_.empty() || empty(), "nothing fits into a step");
  return chunks_;
}

void Scheduler::add_proposal(ScheduledChunk& chunk, std::span<const int32_t> guesses) {
  Sequence& sequence = *chunk.sequence;
  const int64_t room = std::min(budget_, sequence.num_alike() - chunk.num_tokens);
  auto n = std::min<int64_t>(static_cast<int64_t>(guesses.size()), room);
  if (n <= 0) return;
  const int64_t spare = cache_.num_free() - num_promised_blocks();
  while (n > 0 && sequence.num_missing_blocks(chunk.num_tokens + n) > spare) --n;
  if (n == 0) return;
  chunk.proposal.assign(guesses.begin(), guesses.begin() + n);
  chunk.num_tokens += n;
  chunk.num_logits += n;
  sequence.reserve(chunk.num_tokens);
  budget_ -= n;
}

// One token each. Returns who got no block: none behind it may take one first.
const Sequence* Scheduler::decode() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (sequence.num_pending() != 1) continue;
    if (!make_room(sequence, 1)) return &sequence;
    add_chunk(sequence, 1);
  }
  return nullptr;
}

// Those with more to compute than a token, in order.
std::vector<Sequence*> Scheduler::prefilling() const {
  std::vector<Sequence*> sequences;
  for (const auto& sequence : running_) {
    if (sequence->num_pending() > 1) sequences.push_back(sequence.get());
  }
  for (const auto& sequence : waiting_) sequences.push_back(sequence.get());
  std::ranges::sort(sequences, [](const Sequence* a, const Sequence* b) { return a->before(*b); });
  return sequences;
}

// Whether a step has tokens left for this one, if need be those of who is behind it with a lower priority.
bool Scheduler::take_budget(const Sequence& sequence) {
  while (budget_ == 0) {
    if (!preempt_behind(sequence, false)) return false;
  }
  return true;
}

// Somebody before it is about to compute what it will find in the cache then.
bool Scheduler::waits_for_blocks(const Sequence& sequence) const {
  return std::ranges::any_of(
      running_, [&](const auto& other) { return other->before(sequence) && other->computes_blocks_of(sequence); });
}

// From waiting to running, when there is room for all of its tokens beside those that others still have to compute;
// they may take several steps.
bool Scheduler::admit(Sequence& sequence) {
  while (num_running() >= limits_.max_num_seqs) {
    if (!preempt_behind(sequence, false)) return false;
  }
  sequence.adopt_cached_blocks();
  while (cache_.num_free() < sequence.num_missing_blocks(sequence.num_pending()) + num_promised_blocks()) {
    if (preempt_behind(sequence, false)) continue;
    sequence.drop_blocks();
    return false;
  }
  insert(running_, take(waiting_, sequence));
  sequence.started();
  return true;
}

int64_t Scheduler::num_promised_blocks() const {
  int64_t blocks = 0;
  for (const auto& sequence : running_) blocks += sequence->num_missing_blocks(sequence->num_pending());
  return blocks;
}

bool Scheduler::make_room(const Sequence& sequence, int64_t num_tokens) {
  while (cache_.num_free() < sequence.num_missing_blocks(num_tokens)) {
    if (!preempt_behind(sequence, true)) return false;
  }
  return true;
}

// Takes the blocks of the last running sequence, when it is behind this one.
bool Scheduler::preempt_behind(const Sequence& sequence, bool same_priority) {
  if (running_.empty()) return false;
  Sequence& last = *running_.back();
  if (!sequence.before(last) || (!same_priority && last.priority() == sequence.priority())) return false;
  for (const ScheduledChunk& chunk : chunks_) {
    if (chunk.sequence == &last) budget_ += chunk.num_tokens;
  }
  std::erase_if(chunks_, [&](const ScheduledChunk& chunk) { return chunk.sequence == &last; });
  last.drop_blocks();
  insert(waiting_, take(running_, last));
  if (!first_preempted_ || last.before(*first_preempted_)) first_preempted_ = &last;
  ++num_preemptions_;
  return true;
}

void Scheduler::add_chunk(Sequence& sequence, int64_t num_tokens) {
  sequence.reserve(num_tokens);
  chunks_.push_back({&sequence, num_tokens, num_tokens == sequence.num_pending() ? 1 : 0, {}});
  budget_ -= num_tokens;
}

void Scheduler::remove(RequestId id, std::optional<int64_t> index) {
  erase([&](const Sequence& sequence) { return sequence.id() == id && (!index || sequence.index() == *index); });
}

void Scheduler::remove_finished() {
  erase([](const Sequence& sequence) { return sequence.finished().has_value(); });
}

template <typename Predicate>
void Scheduler::erase(const Predicate& predicate) {
  for (Queue* queue : {&running_, &waiting_}) {
    std::erase_if(*queue, [&](const std::unique_ptr<Sequence>& sequence) { return predicate(*sequence); });
  }
}

void Scheduler::insert(Queue& queue, std::unique_ptr<Sequence> sequence) {
  const auto place = std::ranges::upper_bound(queue, sequence, in_order);
  queue.insert(place, std::move(sequence));
}

std::unique_ptr<Sequence> Scheduler::take(Queue& queue, const Sequence& sequence) {
  const auto place = std::ranges::find_if(queue, [&](const auto& entry) { return entry.get() == &sequence; });
  std::unique_ptr<Sequence> taken = std::move(*place);
  queue.erase(place);
  return taken;
}

bool Scheduler::is_running(const Sequence& sequence) const {
  return std::ranges::any_of(running_, [&](const auto& entry) { return entry.get() == &sequence; });
}

}  // namespace coterie
