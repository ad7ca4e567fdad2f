// Speculation: tokens that may come next are guessed, and computed in the same step as the last token. Each token that
// a completion gets is still chosen from the model's logits, and a guess is of use only while it equals the choice; so
// completions are the same with and without, greedy or not.
//
// How many guesses are worth their cost is decided anew in each step, by the share of guesses that came true of late
// (acceptance, of each completion) and by what more tokens cost (see step_cost.h).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "engine/draft_model.h"
#include "engine/scheduler.h"
#include "engine/settings.h"
#include "engine/step_cost.h"

namespace coterie {

struct Guessable {
  double acceptance = 0;  // probability that a guess is right when those before it are
  int64_t most = 0;       // guesses that there are
};

// How many guesses of each completion to compute beside a step's num_tokens tokens, which give num_choices new ones.
// The k-th guess of a completion gives a token more with probability acceptance^k. All guesses cost the same, so the
// likeliest come first, and as many of them are taken as give the most tokens per second. Where draft is given, each
// level of guesses costs a step of it.
std::vector<int64_t> choose_depths(std::span<const Guessable> completions, int64_t num_tokens, int64_t num_choices,
                                   const StepCost& cost, const StepCost* draft = nullptr);

class Speculator {
 public:
  // draft: null where guesses are looked up.
  Speculator(const SpeculationSettings& settings, const StepCost& cost, std::unique_ptr<DraftModel> draft)
      : settings_(settings), cost_(cost), draft_(std::move(draft)) {}

  // False: cannot be measured yet.
  bool measure_draft() { return !draft_ || draft_->measure(); }
  // In seconds, where the draft model's is measured.
  void set_cost(const StepCost& cost) { cost_ = cost; }

  // Adds guesses to those chunks of a step that decode.
  void propose(std::vector<ScheduledChunk>& chunks, Scheduler& scheduler);

 private:
  struct State {
    double acceptance = 0;
    std::vector<int32_t> guess;  // of the last step, whether it was computed or not
    int64_t position = 0;        // of its first token
    int64_t num_idle = 0;        // steps without a guess of the draft model
    std::unique_ptr<DraftSequence> draft;
  };
  struct Candidate {
    ScheduledChunk* chunk = nullptr;
    State* state = nullptr;
    int64_t most = 0;
    int64_t depth = 0;
  };

  std::vector<Candidate> candidates_of(std::vector<ScheduledChunk>& chunks);
  void learn(State& state, const Sequence& sequence);
  void look_up_guesses(std::vector<Candidate>& candidates) const;
  bool may_pay(const Candidate& candidate) const;
  void draft_guesses(std::vector<Candidate>& candidates);
  void set_depths(std::vector<Candidate>& candidates, const std::vector<ScheduledChunk>& chunks) const;

  SpeculationSettings settings_;
  StepCost cost_;
  std::unique_ptr<DraftModel> draft_;
  double usual_acceptance_ = 0.7;  // of all completions, where new ones begin
  std::map<std::pair<RequestId, int64_t>, State> states_;
};

}  // namespace coterie
