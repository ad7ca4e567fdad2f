#include "engine/draft_model.h"

#include <algorithm>

#include "coterie/error.h"
#include "engine/sampler.h"

namespace coterie {
namespace {

// Tokens of a completion that wait for the draft model run alone, in chunks, until there are so few.
constexpr int64_t kFewTokens = 16, kChunk = 512;

// Those that the draft model has not seen, with the guesses so far.
std::vector<int32_t> pending(const DraftTask& task) {
  const auto ids = task.sequence->token_ids();
  const size_t seen = task.draft->token_ids.size();
  std::vector<int32_t> rest;
  if (seen < ids.size()) rest.assign(ids.begin() + static_cast<int64_t>(seen), ids.end());
  const size_t guesses_seen = seen - std::min(seen, ids.size());
  rest.insert(rest.end(), task.guess->begin() + static_cast<int64_t>(guesses_seen), task.guess->end());
  return rest;
}

void add_to(Batch& batch, const DraftTask& task, std::span<const int32_t> token_ids) {
  DraftSequence& draft = *task.draft;
  batch.add(token_ids, static_cast<int64_t>(draft.token_ids.size()), draft.blocks.layers(), draft.start_length);
  draft.token_ids.insert(draft.token_ids.end(), token_ids.begin(), token_ids.end());
}

}  // namespace

DraftModel::DraftModel(const EngineOptions& options, const EngineSettings& settings, int64_t vocab_size,
                       ThreadPool& pool)
    : DraftModel(options, settings, StoredModel(options.draft_model, load_format(options.load_format)), pool) {
  if (config_.vocab_size == vocab_size) return;
  throw InvalidArgument("draft_model: " + options.draft_model + ": its vocabulary has " +
                        std::to_string(config_.vocab_size) + " tokens, the model's " + std::to_string(vocab_size));
}

DraftModel::DraftModel(const EngineOptions& options, const EngineSettings& settings, const StoredModel& model,
                       ThreadPool& pool)
    : config_(model.config()),
      pool_(pool),
      weights_(load_weights(config_, model.tensors(), settings.types, pool,
                            engine_weight_cache(options, settings, model, options.draft_model))),
      weight_mover_(make_weight_mover(options, weights_)),
      decoder_(config_, weights_, pool),
      cache_(config_, settings.kv_cache_dtype, settings.block_size, settings.num_kv_blocks, false),
      types_(types_in_memory(settings.types, weights_)),
      cost_(config_, types_) {}

int64_t DraftModel::room(const Sequence& sequence) const { return config_.max_context() - sequence.num_tokens() + 1; }

bool DraftModel::measure() {
  move_weights();
  if (weight_mover_ || cache_.num_free() == 0) return false;
  cost_ = measure_step_cost(config_, types_, decoder_, cache_);
  return true;
}

void DraftModel::move_weights() {
  if (weight_mover_ && weight_mover_->move_if_ready()) weight_mover_.reset();
}

void DraftModel::guess(std::span<const DraftTask> tasks) {
  move_weights();
  std::vector<const DraftTask*> active;
  for (const DraftTask& task : tasks) {
    if (prepare(task)) active.push_back(&task);
  }
  while (!active.empty()) {
    compute(active);
    std::erase_if(active,
                  [](const DraftTask* task) { return static_cast<int64_t>(task->guess->size()) >= task->num_tokens; });
  }
}

// Forgets what came otherwise, makes room, and catches up. False where there is no room.
bool DraftModel::prepare(const DraftTask& task) {
  const auto ids = task.sequence->token_ids();
  DraftSequence& draft = *task.draft;
  const auto same = std::ranges::mismatch(draft.token_ids, ids).in1 - draft.token_ids.begin();
  draft.token_ids.resize(std::min<size_t>(same, ids.size() - 1));  // the last one's logits are wanted
  if (draft.token_ids.empty()) draft.start_length = task.sequence->start_length();
  if (task.sequence->num_tokens() > cache_.longest_alike(draft.start_length)) {  // all tokens turn otherwise
    draft.start_length = task.sequence->num_tokens();
    draft.token_ids.clear();
  }
  const int64_t needed = task.sequence->num_tokens() + task.num_tokens - 1;
  if (cache_.blocks_for(needed) - draft.blocks.num_blocks() > cache_.num_free()) {
    draft.token_ids.clear();
    draft.blocks.clear();
    return false;
  }
  draft.blocks.reserve(needed);
  while (ids.size() - draft.token_ids.size() > kFewTokens) {
    const auto rest = ids.subspan(draft.token_ids.size());
    Batch batch;
    add_to(batch, task, rest.first(std::min<size_t>(kChunk, rest.size() - 1)));
    decoder_.forward(batch);
  }
  return true;
}

// A guess more for each.
void DraftModel::compute(std::span<const DraftTask* const> tasks) {
  Batch batch;
  for (const DraftTask* task : tasks) add_to(batch, *task, pending(*task));
  choose(tasks, decoder_.forward(batch), batch);
}

void DraftModel::choose(std::span<const DraftTask* const> tasks, const float* hidden_TD, const Batch& batch) {
  const auto C = static_cast<int64_t>(tasks.size());
  const int64_t D = config_.hidden_size, V = config_.vocab_size;
  hidden_CD_.resize(C * D);
  logits_CV_.resize(C * V);
  for (int64_t c = 0; c < C; ++c) {
    const SequenceChunk& chunk = batch.chunks[c];
    std::copy_n(hidden_TD + (chunk.first_row + chunk.num_tokens - 1) * D, D, hidden_CD_.data() + c * D);
  }
  decoder_.logits(hidden_CD_.data(), C, logits_CV_.data());
  pool_.run(C, [&](int64_t c, int) {
    const Sequence& sequence = *tasks[c]->sequence;
    std::vector<int32_t>& guess = *tasks[c]->guess;
    const int64_t position = sequence.num_tokens() + static_cast<int64_t>(guess.size());
    const int32_t token =
        sample(std::span(logits_CV_).subspan(c * V, V), sequence.sampling(), sequence.index(), position);
    guess.push_back(token == kNoToken ? 0 : token);
  });
}

}  // namespace coterie
