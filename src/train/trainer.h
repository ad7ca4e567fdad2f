// One training run: data, model, optimizer, schedule, checkpoints. The caller (the command) decides
// when to evaluate, save and stop, and draws what step() and evaluate() return.
//
// Reproducible: with equal settings and threads every step has the same bits, also when the run was
// stopped and resumed anywhere. One thread at a time; torch's thread count is set process-wide.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moe/load.h"
#include "train/adamw.h"
#include "train/checkpoint.h"
#include "train/distiller.h"
#include "train/language_model.h"
#include "train/packed_dataset.h"
#include "train/settings.h"

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
  Trainer(const ModelConfig& config, const RunSettings& settings);
  Trainer(const Trainer&) = delete;  // the optimizer refers to the model

  bool resume();       // from the newest checkpoint in output_dir; false when there is none
  StepMetrics step();  // also throws what went wrong with a save since the last one
  EvalMetrics evaluate() const;
  void save();                // a copy of the state, written while training goes on
  std::string finish_save();  // waits for it; the newest checkpoint's path, empty without any
  void export_model(const std::string& directory) const;

  bool finished() const { return state_.step >= total_steps_; }
  int64_t total_steps() const { return total_steps_; }
  const TrainState& state() const { return state_; }
  const LanguageModel& model() const { return model_; }

 private:
  struct Tally;  // sums over the micro-batches of one step
  void micro_batch(int64_t index, Tally& tally);

  RunSettings settings_;
  int64_t total_steps_;
  LanguageModel model_;
  PackedDataset train_data_;
  PackedDataset valid_data_;
  std::optional<Distiller> distiller_;  // before the optimizer: it may set the student's first weights
  AdamW optimizer_;
  TrainState state_;
  CheckpointSaver saver_;
};

// config.json and model.safetensors in logical names and the parameters' own dtypes.
void export_language_model(const LanguageModel& model, const std::string& directory);

}  // namespace coterie
