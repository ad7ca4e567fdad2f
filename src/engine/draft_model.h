// A smaller model with the same vocabulary that guesses what the model will say.
//
// It has a KV cache of its own. A completion's part of it holds the tokens that the draft model has seen, guesses
// included; before it guesses again, what turned out different is computed anew.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "engine/kv_cache.h"
#include "engine/sequence.h"
#include "engine/settings.h"
#include "engine/step_cost.h"
#include "model/decoder.h"
#include "model/stored_model.h"
#include "model/weights.h"

namespace coterie {

struct DraftSequence {
  explicit DraftSequence(KvCache& cache) : blocks(cache) {}

  BlockTable blocks;
  std::vector<int32_t> token_ids;  // those in the cache
  int64_t start_length = 0;        // as the completion's, see Sequence
};

// Tokens to guess behind those of a completion.
struct DraftTask {
  const Sequence* sequence = nullptr;
  DraftSequence* draft = nullptr;
  int64_t num_tokens = 0;
  std::vector<int32_t>* guess = nullptr;  // what is guessed goes here: nothing where the cache has no room
};

class DraftModel {
 public:
  // As large a cache as the model's, in tokens. InvalidArgument where the vocabulary is not of vocab_size.
  DraftModel(const EngineOptions& options, const EngineSettings& settings, int64_t vocab_size, ThreadPool& pool);

  std::unique_ptr<DraftSequence> begin() { return std::make_unique<DraftSequence>(cache_); }
  int64_t room(const Sequence& sequence) const;  // tokens that can be guessed before the draft model's context ends
  // All together, token by token. Chosen with the completion's temperature and random numbers: where both models think
  // alike, the same number chooses the same token.
  void guess(std::span<const DraftTask> tasks);
  const StepCost& cost() const { return cost_; }  // until measure(), in bytes
  bool measure();                                 // false where the weights are not yet where they stay

 private:
  DraftModel(const EngineOptions& options, const EngineSettings& settings, const StoredModel& model, ThreadPool& pool);
  void move_weights();
  bool prepare(const DraftTask& task);
  void compute(std::span<const DraftTask* const> tasks);
  void choose(std::span<const DraftTask* const> tasks, const float* hidden_TD, const Batch& batch);

  ModelConfig config_;
  ThreadPool& pool_;
  ModelWeights weights_;
  std::unique_ptr<WeightMover> weight_mover_;  // until they are where they stay
  Decoder decoder_;
  KvCache cache_;
  WeightTypes types_;
  StepCost cost_;
  std::vector<float> hidden_CD_, logits_CV_;
};

}  // namespace coterie
