#include "train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <malloc.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <span>
#include <tuple>

#include "base/machine.h"
#include "comm/small_sums.h"
#include "coterie/error.h"
#include "io/checkpoint_source.h"
#include "io/safetensors.h"
#include "train/views.h"

namespace coterie {
namespace {

// A step allocates and frees the same large tensors again and again. glibc would hand each back to the
// kernel and fault it in anew, page by page, which costs more than many of our kernels; keep them.
void keep_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 2000 << 20);
}

RunSettings prepared(const RunSettings& settings) {
  keep_freed_memory();
  at::set_num_threads(settings.train.threads > 0 ? static_cast<int>(settings.train.threads) : available_cpus());
  return settings;
}

// The degrees that are asked for, with what they are judged by.
ExpertParallelSettings expert_settings(const RunSettings& settings, ProcessGroup* world) {
  ExpertParallelSettings experts = settings.parallel.experts;
  const TrainSettings& train = settings.train;
  experts.tokens_per_rank = train.batch_size / train.gradient_accumulation_steps / (world ? world->size() : 1) *
                            settings.data.sequence_length;
  return experts;
}

std::optional<Distiller> make_distiller(const RunSettings& settings, const LanguageModel& student,
                                        int64_t total_steps) {
  if (!settings.distill) return std::nullopt;
  Distiller distiller(*settings.distill, student.config(), parameter_type(settings.train.dtype), total_steps);
  distiller.initialize(student);
  return distiller;
}

at::Tensor inputs_of(const at::Tensor& windows) { return windows.narrow(1, 0, windows.size(1) - 1).contiguous(); }
at::Tensor targets_of(const at::Tensor& windows) { return windows.narrow(1, 1, windows.size(1) - 1).reshape({-1}); }

}  // namespace

struct Trainer::Tally {
  explicit Tally(const ModelConfig& config) {
    for (const LayerConfig& layer : config.layers) {
      if (layer.is_moe()) loads.emplace_back(layer.router);
    }
  }

  StepMetrics metrics;
  std::vector<LoadCounter> loads;  // per MoE layer
  BalanceCounts balance_counts;

  // Makes sums over micro-batches of this rank those of all ranks.
  void sum_over(ProcessGroup* world) {
    std::array<double, 3> losses = {metrics.loss, metrics.balance_loss, metrics.kl_loss};
    sum_over_ranks(world, losses, "losses");
    std::tie(metrics.loss, metrics.balance_loss, metrics.kl_loss) = std::tuple_cat(losses);
    std::vector<std::span<int64_t>> counts;
    for (LoadCounter& load : loads) counts.insert(counts.end(), {load.counts()[0], load.counts()[1]});
    sum_over_ranks(world, counts, "loads");
  }

  void finish() {
    int64_t chosen = 0, kept = 0;
    for (const LoadCounter& load : loads) {
      metrics.loads.push_back(load.stats());
      chosen += load.num_chosen();
      kept += load.num_kept();
    }
    if (chosen > 0) metrics.dropped = 1.0 - static_cast<double>(kept) / static_cast<double>(chosen);
  }
};

Trainer::Trainer(const ModelConfig& config, const RunSettings& settings, ProcessGroup* world)
    : settings_(prepared(settings)),
      world_(world && world->size() > 1 ? world : nullptr),
      total_steps_(settings.train.total_steps(settings.data.sequence_length)),
      model_(config, parameter_type(settings.train.dtype), settings.train.seed, world_,
             expert_settings(settings, world_)),
      train_data_(settings.data.path, "train", settings.data.sequence_length, settings.train.seed),
      valid_data_(settings.data.path, "valid", settings.data.sequence_length, settings.train.seed),
      distiller_(make_distiller(settings_, model_, total_steps_)),
      optimizer_(model_.parameters(), settings.train.gradient_accumulation_steps, settings_.parallel, world_),
      saver_(config, settings_, world_) {
  const int64_t sequences = settings.train.batch_size / settings.train.gradient_accumulation_steps;
  if (sequences % ranks() != 0) {
    throw InvalidArgument("train.batch_size: batch_size / gradient_accumulation_steps (" + std::to_string(sequences) +
                          ") is not divisible by the number of ranks (" + std::to_string(ranks()) + ")");
  }
  if (config.vocab_size < train_data_.tokens().vocab_size()) {
    throw InvalidArgument("model.vocab_size: " + std::to_string(config.vocab_size) + " is below the data's " +
                          std::to_string(train_data_.tokens().vocab_size()) + " (" + settings.data.path + ")");
  }
  if (settings.data.sequence_length > config.max_position_embeddings) {
    throw InvalidArgument("data.sequence_length: " + std::to_string(settings.data.sequence_length) +
                          " exceeds model.max_position_embeddings (" + std::to_string(config.max_position_embeddings) +
                          ")");
  }
}

bool Trainer::resume() {
  const auto state = load_latest_checkpoint(model_.config(), settings_, optimizer_.state_views(), world_);
  if (!state) return false;
  state_ = *state;
  optimizer_.publish_masters();
  optimizer_.set_num_steps(state_.step);
  return true;
}

StepMetrics Trainer::step(const ZeroOptimizer::Inspect& inspect) {
  saver_.check();
  const auto start = std::chrono::steady_clock::now();
  const int64_t tokens_per_step = settings_.train.batch_size * settings_.data.sequence_length;
  Tally tally(model_.config());
  for (int64_t i = 0; i < settings_.train.gradient_accumulation_steps; ++i) micro_batch(i, tally);
  StepMetrics& metrics = tally.metrics;
  tally.sum_over(world_);
  tally.finish();
  metrics.tokens = (state_.step + 1) * tokens_per_step;
  metrics.learning_rate = learning_rate_at(settings_.train, metrics.tokens);
  metrics.grad_norm = optimizer_.step(optimizer_settings(metrics.learning_rate), settings_.train.max_grad_norm,
                                      /*skips_overflow=*/false, inspect);
  model_.update_choice_biases(tally.loads, settings_.train.choice_bias_rate);
  metrics.step = ++state_.step;
  metrics.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  state_.train_seconds += metrics.seconds;
  return metrics;
}

// Matrices alone decay.
std::vector<AdamWSettings> Trainer::optimizer_settings(double learning_rate) const {
  const TrainSettings& train = settings_.train;
  std::vector<AdamWSettings> settings;
  for (const Parameter& parameter : model_.parameters()) {
    const bool decays = parameter.tensor.dim() >= 2 && !parameter.name.ends_with(".bias");
    settings.push_back({.learning_rate = learning_rate,
                        .beta1 = train.beta1,
                        .beta2 = train.beta2,
                        .eps = train.eps,
                        .weight_decay = decays ? train.weight_decay : 0.0});
  }
  return settings;
}

int64_t Trainer::pass_sequences() const {
  return settings_.train.batch_size / settings_.train.gradient_accumulation_steps / ranks();
}

void Trainer::micro_batch(int64_t index, Tally& tally) {
  const TrainSettings& train = settings_.train;
  const int64_t count = pass_sequences();
  const int64_t first = (index * ranks() + rank()) * count;  // sequence of the step
  const at::Tensor windows = train_data_.training_batch(state_.step * train.batch_size + first, count);
  const at::Tensor inputs = inputs_of(windows);
  const bool whole_batch = train.balance_loss_scope == "global_batch";
  const ForwardResult result =
      model_.forward(inputs, {.training = true,
                              .seed = train.seed,
                              .step = static_cast<uint64_t>(state_.step),
                              .first_token = first * settings_.data.sequence_length,
                              .balance_choices = train.balance_loss_choices,
                              .balance_counts = whole_batch ? &tally.balance_counts : nullptr});
  const auto teacher = distiller_ ? distiller_->signal(inputs, state_.step) : std::nullopt;
  const HeadLoss head = head_loss(result.hidden_TD, model_.head(), targets_of(windows), teacher ? &*teacher : nullptr);
  at::Tensor loss = head.loss;
  if (result.balance_loss.defined()) loss = loss + train.balance_loss * result.balance_loss;
  if (result.z_loss.defined()) loss = loss + train.z_loss * result.z_loss;
  const double share = 1.0 / static_cast<double>(train.gradient_accumulation_steps * ranks());
  (loss * share).backward();
  optimizer_.accumulate_gradients();
  tally.metrics.loss += share * head.cross_entropy;
  tally.metrics.kl_loss += share * head.kl;
  if (result.balance_loss.defined()) tally.metrics.balance_loss += share * result.balance_loss.item<double>();
  for (size_t layer = 0; layer < tally.loads.size(); ++layer) tally.loads[layer].add(*result.routings[layer]);
}

EvalMetrics Trainer::evaluate() const {
  c10::NoGradGuard no_grad;
  const int64_t length = settings_.data.sequence_length;
  int64_t num_windows = valid_data_.num_windows();
  if (settings_.train.eval_tokens > 0) {
    num_windows = std::clamp<int64_t>(settings_.train.eval_tokens / length, 1, num_windows);
  }
  const int64_t batch = pass_sequences();
  double sum = 0;
  for (int64_t round = 0; round < num_windows; round += batch * ranks()) {
    // Every rank has as many passes as the others, the last perhaps without windows.
    const int64_t first = std::min(round + rank() * batch, num_windows);
    const int64_t count = std::min(batch, num_windows - first);
    const at::Tensor windows = valid_data_.windows(first, count);
    const ForwardResult result =
        model_.forward(inputs_of(windows), {.training = false, .first_token = rank() * batch * length});
    if (count == 0) continue;
    const at::Tensor targets = targets_of(windows);
    const double loss = head_loss(result.hidden_TD, model_.head(), targets, nullptr).cross_entropy;
    sum += loss * static_cast<double>(targets.size(0));
  }
  sum_over_ranks(world_, {&sum, 1}, "validation loss");
  EvalMetrics metrics{.tokens = num_windows * length, .loss = sum / static_cast<double>(num_windows * length)};
  const PackedTokens& tokens = valid_data_.tokens();
  metrics.loss_per_byte =
      metrics.loss * static_cast<double>(tokens.num_tokens()) / static_cast<double>(tokens.num_bytes());
  return metrics;
}

void Trainer::save() { saver_.start(state_, optimizer_.state_views()); }
std::string Trainer::finish_save() { return saver_.finish(); }

void Trainer::export_model(const std::string& directory) {
  saver_.finish();
  const std::string checkpoint = latest_checkpoint(settings_);
  const CheckpointSource source(checkpoint);
  std::filesystem::create_directories(directory);
  std::vector<at::Tensor> values;
  std::vector<TensorToWrite> tensors;
  for (const Parameter& parameter : model_.parameters()) {
    at::Tensor masters = at::empty(parameter.logical_shape, at::kFloat);
    source.read(parameter.name, masters.mutable_data_ptr<float>());
    values.push_back(masters.to(parameter.tensor.scalar_type()));
    tensors.push_back(
        {parameter.name, parameter.logical_shape, dtype_of(values.back()), values.back().const_data_ptr()});
  }
  write_safetensors(directory + "/model.safetensors", tensors, {{"format", "pt"}});
  write_text_file(directory + "/config.json", model_.config().to_json());
}

}  // namespace coterie
