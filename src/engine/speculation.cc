#include "engine/speculation.h"

#include <algorithm>

#include "engine/prompt_lookup.h"

namespace coterie {
namespace {

constexpr double kNewest = 1.0 / 8;        // weight of a completion's last guess in its acceptance
constexpr double kNewestOfAll = 1.0 / 64;  // in that of all
constexpr double kHopeful = 0.9;           // where even this acceptance doesn't pay, a draft model is never asked
// After so many steps without a guess, the draft model guesses a token, just to see whether it is right.
constexpr int64_t kProbeEvery = 16, kLaterProbes = 64;

// Rarer with time.
bool is_probe(int64_t num_idle) {
  return num_idle == kProbeEvery || num_idle == 2 * kProbeEvery || (num_idle > 0 && num_idle % kLaterProbes == 0);
}

bool may_guess(const ScheduledChunk& chunk) {
  Sequence& sequence = *chunk.sequence;
  return chunk.num_tokens == 1 && chunk.num_logits == 1 && !sequence.output().empty() &&
         !sequence.shared().request.token_mask;
}

}  // namespace

std::vector<int64_t> choose_depths(std::span<const Guessable> completions, int64_t num_tokens, int64_t num_choices,
                                   const StepCost& cost, const StepCost* draft) {
  struct Guess {
    size_t completion;
    size_t level;
    double probability;
  };
  std::vector<Guess> guesses;
  for (size_t c = 0; c < completions.size(); ++c) {
    double probability = 1;
    for (int64_t level = 0; level < completions[c].most; ++level) {
      guesses.push_back({c, static_cast<size_t>(level), probability *= completions[c].acceptance});
    }
  }
  std::ranges::stable_sort(guesses, std::greater{}, &Guess::probability);

  auto gain = static_cast<double>(num_choices);
  double drafting = 0, best_rate = gain / cost.seconds(num_tokens);
  size_t best = 0;
  std::vector<int64_t> drafted(guesses.size(), 0);  // guesses of each level
  for (size_t i = 0; i < guesses.size(); ++i) {
    gain += guesses[i].probability;
    if (draft) {
      const int64_t n = drafted[guesses[i].level]++;
      drafting += draft->seconds(n + 1) - (n > 0 ? draft->seconds(n) : 0);
    }
    const double rate = gain / (cost.seconds(num_tokens + static_cast<int64_t>(i) + 1) + drafting);
    if (rate > best_rate) best_rate = rate, best = i + 1;
  }
  std::vector<int64_t> depths(completions.size(), 0);
  for (size_t i = 0; i < best; ++i) ++depths[guesses[i].completion];
  return depths;
}

void Speculator::propose(std::vector<ScheduledChunk>& chunks, Scheduler& scheduler) {
  std::vector<Candidate> candidates = candidates_of(chunks);
  if (!draft_) look_up_guesses(candidates);
  set_depths(candidates, chunks);
  if (draft_) draft_guesses(candidates);
  for (const Candidate& candidate : candidates) {
    const std::vector<int32_t>& guess = candidate.state->guess;
    const size_t depth = std::min<size_t>(candidate.depth, guess.size());
    scheduler.add_proposal(*candidate.chunk, std::span(guess).first(depth));
  }
}

// Those that decode. Forgets completions that are no longer among them.
std::vector<Speculator::Candidate> Speculator::candidates_of(std::vector<ScheduledChunk>& chunks) {
  std::map<std::pair<RequestId, int64_t>, State> before;
  before.swap(states_);
  std::vector<Candidate> candidates;
  for (ScheduledChunk& chunk : chunks) {
    if (!may_guess(chunk)) continue;
    const Sequence& sequence = *chunk.sequence;
    const std::pair<RequestId, int64_t> key = {sequence.id(), sequence.index()};
    const auto known = before.find(key);
    State& state = states_[key];
    if (known == before.end()) {
      state.acceptance = usual_acceptance_;
    } else {
      state = std::move(known->second);
    }
    learn(state, sequence);
    const int64_t most = std::min(settings_.max_tokens, sequence.num_left() - 1);
    candidates.push_back({&chunk, &state, draft_ ? std::min(most, draft_->room(sequence)) : most});
  }
  return candidates;
}

// What came of the last guess, up to its first wrong token.
void Speculator::learn(State& state, const Sequence& sequence) {
  const auto came = sequence.token_ids().subspan(std::min(state.position, sequence.num_tokens()));
  for (size_t i = 0; i < std::min(state.guess.size(), came.size()); ++i) {
    const bool right = state.guess[i] == came[i];
    state.acceptance += kNewest * (right - state.acceptance);
    usual_acceptance_ += kNewestOfAll * (right - usual_acceptance_);
    if (!right) break;
  }
  state.guess.clear();
  state.position = sequence.num_tokens();
}

void Speculator::look_up_guesses(std::vector<Candidate>& candidates) const {
  for (Candidate& candidate : candidates) {
    const auto found = look_up(candidate.chunk->sequence->token_ids(), settings_.lookup_min, settings_.lookup_max,
                               std::max<int64_t>(candidate.most, 0));
    candidate.state->guess.assign(found.begin(), found.end());
    candidate.most = static_cast<int64_t>(found.size());
  }
}

void Speculator::set_depths(std::vector<Candidate>& candidates, const std::vector<ScheduledChunk>& chunks) const {
  int64_t num_tokens = 0, num_choices = 0;
  for (const ScheduledChunk& chunk : chunks) num_tokens += chunk.num_tokens, num_choices += chunk.num_logits;
  std::vector<Guessable> guessable;
  for (const Candidate& candidate : candidates) guessable.push_back({candidate.state->acceptance, candidate.most});
  const StepCost* draft_cost = draft_ ? &draft_->cost() : nullptr;
  const std::vector<int64_t> depths = choose_depths(guessable, num_tokens, num_choices, cost_, draft_cost);
  for (size_t i = 0; i < candidates.size(); ++i) {
    candidates[i].depth = settings_.adaptive ? depths[i] : std::max<int64_t>(candidates[i].most, 0);
  }
}

bool Speculator::may_pay(const Candidate& candidate) const {
  const Guessable hopeful = {kHopeful, candidate.most};
  return choose_depths({&hopeful, 1}, 1, 1, cost_, &draft_->cost())[0] > 0;
}

void Speculator::draft_guesses(std::vector<Candidate>& candidates) {
  std::vector<DraftTask> tasks;
  for (Candidate& candidate : candidates) {
    State& state = *candidate.state;
    int64_t depth = candidate.depth;
    state.num_idle = depth > 0 ? 0 : state.num_idle + 1;
    if (is_probe(state.num_idle) && may_pay(candidate)) depth = 1;
    if (depth == 0) continue;
    if (!state.draft) state.draft = draft_->begin();
    tasks.push_back({candidate.chunk->sequence, state.draft.get(), depth, &state.guess});
  }
  draft_->guess(tasks);
}

}  // namespace coterie
