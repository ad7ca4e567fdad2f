// One training run: data, model, optimizer, schedule, checkpoints. The caller (the command) decides
// when to evaluate, save and stop, and draws what step() and evaluate() return.
//
// Reproducible: with equal settings and threads every step has the same bits, also when the run was
// stopped and resumed anywhere. One thread at a time; torch's thread count is set process-wide.
//
// With several ranks each has a Trainer of equal settings and calls the same of its functions that are marked
// collective, in the same order. A rank takes its stretch of the sequences of every micro-batch; what step() and
// evaluate() return is of whole batches, the same on all ranks but for the seconds.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/process_group.h"
#include "moe/load.h"
#include "train/checkpoint.h"
#include "train/distiller.h"
#include "train/language_model.h"
#include "train/packed_dataset.h"
#include "train/settings.h"
#include "train/zero_optimizer.h"

namespace coterie {

struct StepMetrics {
  int64_t step = 0;         // finished steps
  int64_t tokens = 0;       // trained on so far
  double loss = 0;          // cross-entropy, nats per token, mean of the step
  double balance_loss = 0;  // sum over MoE layers, before its coefficient
  double kl_loss = 0;       // 0 without a teacher
  double grad_norm = 0;     // before clipping
  double learning_rate = 0;
  double seconds = 0;
  double dropped = 0;            // share of the routed choices that found no place
  std::vector<LoadStats> loads;  // per MoE layer
};

struct EvalMetrics {
  int64_t tokens = 0;        // predicted
  double loss = 0;           // nats per token
  double loss_per_byte = 0;  // nats per byte of text: does not depend on the tokenizer
};

class Trainer {
 public:
  // `world`: all ranks of the run, which outlives the trainer; null: this one alone. InvalidArgument when the
  // micro-batches can't be shared equally, or the data don't fit the model.
  Trainer(const ModelConfig& config, const RunSettings& settings, ProcessGroup* world = nullptr);
  Trainer(const Trainer&) = delete;  // the optimizer refers to the model

  bool resume();  // collective; from the newest checkpoint in output_dir; false when there is none
  // Collective; also throws what went wrong with a save since the last one. `inspect` may look at the gradients and
  // their norm, see ZeroOptimizer::step().
  StepMetrics step(const ZeroOptimizer::Inspect& inspect = {});
  EvalMetrics evaluate() const;  // collective
  void save();                   // collective; a copy of the state, written while training goes on
  std::string finish_save();     // waits for it; the newest checkpoint's path on rank 0, empty without any
  // The model of the newest checkpoint, whole, whatever rank held what: config.json and model.safetensors in logical
  // names and the parameters' own dtypes. Waits for a save that is under way; one rank is enough. InvalidArgument
  // without a checkpoint.
  void export_model(const std::string& directory);

  int64_t ranks() const { return world_ ? world_->size() : 1; }
  int64_t rank() const { return world_ ? world_->rank() : 0; }
  bool finished() const { return state_.step >= total_steps_; }
  int64_t total_steps() const { return total_steps_; }
  const TrainState& state() const { return state_; }
  const LanguageModel& model() const { return model_; }
  const ZeroOptimizer& optimizer() const { return optimizer_; }

 private:
  struct Tally;                    // sums over the micro-batches of one step
  int64_t pass_sequences() const;  // that go through this rank's model at once
  std::vector<AdamWSettings> optimizer_settings(double learning_rate) const;
  void micro_batch(int64_t index, Tally& tally);

  RunSettings settings_;
  ProcessGroup* world_;  // null: one rank
  int64_t total_steps_;
  LanguageModel model_;
  PackedDataset train_data_;
  PackedDataset valid_data_;
  std::optional<Distiller> distiller_;  // before the optimizer: it may set the student's first weights
  ZeroOptimizer optimizer_;
  TrainState state_;
  CheckpointSaver saver_;
};

}  // namespace coterie
