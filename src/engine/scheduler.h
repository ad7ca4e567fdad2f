// Which tokens of which completions the next step computes.
//
// Completions have an order: priority, then arrival. A step takes one token of each decoding completion, then prompts
// in that order as far as the budget goes, in chunks. So decoding goes on beside a long prompt, and nobody is
// overtaken by a later one of the same priority: a waiting completion that does not fit lets no waiting one pass it.
// (One that waits for another to compute what both begin with does: it loses nothing.)
// Who needs blocks when there are none takes them from the last in order behind it, which computes them again later.
// The first in order can thus take everything, and gets to its end.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/sequence.h"

namespace coterie {

struct SchedulerLimits {
  int64_t max_num_seqs = 0;
  int64_t max_num_batched_tokens = 0;
};

// The next num_tokens tokens of a sequence; the last of them may be guesses of tokens that it doesn't have yet. Logits
// are wanted behind the last num_logits of them.
struct ScheduledChunk {
  Sequence* sequence = nullptr;
  int64_t num_tokens = 0;
  int64_t num_logits = 0;
  std::vector<int32_t> proposal;  // the guesses

  std::vector<int32_t> token_ids() const;
};

class Scheduler {
 public:
  Scheduler(KvCache& cache, const SchedulerLimits& limits) : cache_(cache), limits_(limits) {}

  void add(std::unique_ptr<Sequence> sequence);

  // The blocks that the chunks need are reserved. It may be called again where a step came to nothing.
  std::vector<ScheduledChunk> schedule();

  // Adds guesses to a chunk of the last schedule() that decodes: those for which the step's budget has tokens left and
  // the cache blocks that nobody else counts on.
  void add_proposal(ScheduledChunk& chunk, std::span<const int32_t> guesses);

  void remove(RequestId id, std::optional<int64_t> index);  // the request's completions, or one of them
  void remove_finished();

  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_preemptions() const { return num_preemptions_; }
  bool empty() const { return running_.empty() && waiting_.empty(); }

 private:
  using Queue = std::vector<std::unique_ptr<Sequence>>;  // in order

  static void insert(Queue& queue, std::unique_ptr<Sequence> sequence);
  static std::unique_ptr<Sequence> take(Queue& queue, const Sequence& sequence);
  bool is_running(const Sequence& sequence) const;
  template <typename Predicate>
  void erase(const Predicate& predicate);

  std::vector<Sequence*> prefilling() const;
  const Sequence* decode();
  bool take_budget(const Sequence& sequence);
  bool waits_for_blocks(const Sequence& sequence) const;
  bool admit(Sequence& sequence);
  int64_t num_promised_blocks() const;
  bool make_room(const Sequence& sequence, int64_t num_tokens);
  bool preempt_behind(const Sequence& sequence, bool same_priority);
  void add_chunk(Sequence& sequence, int64_t num_tokens);

  KvCache& cache_;
  SchedulerLimits limits_;
  Queue running_, waiting_;
  int64_t num_preemptions_ = 0;

  // Of the step that is being made.
  std::vector<ScheduledChunk> chunks_;
  int64_t budget_ = 0;
  const Sequence* first_preempted_ = nullptr;  // in order, of this step: nobody behind it is admitted
};

}  // namespace coterie
