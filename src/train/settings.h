// What a training run is told, as one JSON object that the command has resolved from a TOML file
// (docs/configuration.md lists the keys with their defaults): {"data": {...}, "train": {...},
// "parallel": {...}, "distill": {...} or null}. Every key must be there; unknown keys are errors.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/expert_layout.h"
#include "train/optimizer_states.h"
#include "train/router_losses.h"

namespace coterie {

struct DataSettings {
  std::string path;             // a prepared data directory (packed_tokens.h)
  int64_t sequence_length = 0;  // tokens per sequence
};

struct TrainSettings {
  std::string output_dir;
  int64_t tokens = 0;                       // trained on in all; rounded up to whole steps
  int64_t batch_size = 0;                   // sequences per optimizer step
  int64_t gradient_accumulation_steps = 1;  // batch_size / this many sequences go through the model at once
  double learning_rate = 0;
  double min_learning_rate = 0;
  int64_t warmup_tokens = 0;  // linear
  int64_t decay_tokens = 0;   // cosine, from the start of training; constant minimum afterwards
  double weight_decay = 0;    // matrices only
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double max_grad_norm = 1.0;  // 0: no clipping
  double balance_loss = 0.01;  // coefficient of the sum over MoE layers
  BalanceChoices balance_loss_choices = BalanceChoices::kAll;
  std::string balance_loss_scope = "micro_batch";  // or "global_batch": the load of the step so far
  double z_loss = 0.0;
  double choice_bias_rate = 1e-3;  // what a step moves each choice bias by
  std::string dtype = "fp32";      // "fp32" or "bf16" (fp32 master weights)
  uint64_t seed = 0;
  int64_t threads = 0;      // 0: as many as the process may use
  int64_t eval_tokens = 0;  // 0: the whole validation split
  int64_t keep_checkpoints = 2;

  int64_t total_steps(int64_t sequence_length) const;
};

struct DistillSettings {
  std::string teacher;  // directory of an exported model
  double alpha = 1.0;
  double temperature = 1.0;
  double stop_at = 1.0;  // KL is off from this step on (above 1), or from this fraction of the steps on
  bool student_from_teacher = true;
  std::vector<int64_t> drop_layers;  // layers of the teacher that the student leaves out

  int64_t stop_step(int64_t total_steps) const;
};

// How the work and the states are spread over ranks and kept (zero_optimizer.h, expert_layout.h).
struct ParallelSettings {
  int64_t zero_stage = 1;
  int64_t reduce_bucket_size = 4 << 20;  // elements; a larger parameter has a bucket to itself
  ExpertParallelSettings experts;        // expert_parallel, ranks_per_node, all_to_all
  OptimizerStateSettings states;         // moments_dtype, offload_optimizer
};

struct RunSettings {
  DataSettings data;
  TrainSettings train;
  ParallelSettings parallel;
  std::optional<DistillSettings> distill;

  static RunSettings from_json(const std::string& text);  // InvalidArgument names the key and the value
};

// Linear warm-up to learning_rate, then a cosine down to min_learning_rate; `tokens` counts the
// tokens seen when the step ends, so the first step already learns.
double learning_rate_at(const TrainSettings& settings, int64_t tokens);

}  // namespace coterie
