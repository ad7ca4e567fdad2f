// Training checkpoints: OUTPUT_DIR/checkpoints/step-NNNNNNNN/ with the fp32 master weights
// (model.safetensors), the moments (optimizer.safetensors), the model's config.json and state.json.
// A checkpoint is written aside, fsynced and renamed; `latest`, a text file with the newest name, is
// moved last: whoever dies at any moment leaves a whole checkpoint behind.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "model/config.h"
#include "train/adamw.h"

namespace coterie {

// Where a run stands. Data order and random choices follow from `step` alone.
struct TrainState {
  int64_t step = 0;          // finished optimizer steps
  double train_seconds = 0;  // spent in steps, all sittings together
};

// Returns the checkpoint's path. Keeps the newest `keep` and removes older ones.
std::string save_checkpoint(const std::string& output_dir, const ModelConfig& config, const AdamW& optimizer,
                            const TrainState& state, int64_t keep);

// Loads the checkpoint that `latest` names into the optimizer and its parameters; nothing when there
// is none. InvalidArgument or CorruptFile when it is of another model or damaged.
std::optional<TrainState> load_latest_checkpoint(const std::string& output_dir, const ModelConfig& config,
                                                 AdamW& optimizer);

}  // namespace coterie
