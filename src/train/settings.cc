#include "train/settings.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>

#include "base/round.h"
#include "coterie/error.h"
#include "train/expert_parallel_json.h"

namespace coterie {
namespace {

using Json = nlohmann::json;

// Takes keys out of one JSON object, and complains of what nobody took.
class Section {
 public:
  Section(const Json& root, const std::string& name) : name_(name) {
    if (!root.contains(name) || !root[name].is_object()) throw InvalidArgument(name + ": missing");
    object_ = root[name];
  }

  template <typename T>
  void take(const char* key, T& value) {
    taken_.insert(key);
    if (!object_.contains(key)) throw InvalidArgument(name_ + "." + key + ": missing");
    try {
      value = object_[key].get<T>();
    } catch (const Json::exception&) {
      throw InvalidArgument(name_ + "." + key + ": wrong type (" + object_[key].dump() + ")");
    }
  }

  // Keys that are the command's business (how often to save, how to draw), not the trainer's.
  void ignore(const char* key) { taken_.insert(key); }

  void finish() const {
    for (const auto& [key, value] : object_.items()) {
      if (!taken_.count(key)) throw InvalidArgument(name_ + "." + key + ": unknown key (" + value.dump() + ")");
    }
  }

  void check(bool condition, const char* key, const std::string& rule) const {
    if (!condition) throw InvalidArgument(name_ + "." + key + ": " + rule + " (" + object_[key].dump() + ")");
  }

 private:
  std::string name_;
  Json object_;
  std::set<std::string> taken_;
};

DataSettings parse_data(const Json& root) {
  DataSettings data;
  Section section(root, "data");
  section.take("path", data.path);
  section.take("sequence_length", data.sequence_length);
  section.finish();
  section.check(data.sequence_length > 0, "sequence_length", "must be positive");
  return data;
}

TrainSettings parse_train(const Json& root) {
  TrainSettings train;
  Section section(root, "train");
  section.take("output_dir", train.output_dir);
  section.take("tokens", train.tokens);
  section.take("batch_size", train.batch_size);
  section.take("gradient_accumulation_steps", train.gradient_accumulation_steps);
  section.take("learning_rate", train.learning_rate);
  section.take("min_learning_rate", train.min_learning_rate);
  section.take("warmup_tokens", train.warmup_tokens);
  section.take("decay_tokens", train.decay_tokens);
  section.take("weight_decay", train.weight_decay);
  section.take("beta1", train.beta1);
  section.take("beta2", train.beta2);
  section.take("eps", train.eps);
  section.take("max_grad_norm", train.max_grad_norm);
  section.take("balance_loss", train.balance_loss);
  std::string balance_loss_choices;
  section.take("balance_loss_choices", balance_loss_choices);
  section.take("balance_loss_scope", train.balance_loss_scope);
  section.take("z_loss", train.z_loss);
  section.take("choice_bias_rate", train.choice_bias_rate);
  section.take("dtype", train.dtype);
  section.take("seed", train.seed);
  section.take("threads", train.threads);
  section.take("eval_tokens", train.eval_tokens);
  section.take("keep_checkpoints", train.keep_checkpoints);
  for (const char* key : {"eval_every", "save_every", "tensorboard"}) section.ignore(key);
  section.finish();
  section.check(train.tokens > 0, "tokens", "must be positive");
  section.check(train.batch_size > 0, "batch_size", "must be positive");
  section.check(train.gradient_accumulation_steps > 0 && train.batch_size % train.gradient_accumulation_steps == 0,
                "gradient_accumulation_steps", "must divide train.batch_size");
  section.check(train.learning_rate > 0, "learning_rate", "must be positive");
  section.check(train.threads >= 0, "threads", "must not be negative");
  section.check(train.keep_checkpoints > 0, "keep_checkpoints", "must be positive");
  section.check(balance_loss_choices == "all" || balance_loss_choices == "first", "balance_loss_choices",
                "must be all or first");
  section.check(train.balance_loss_scope == "micro_batch" || train.balance_loss_scope == "global_batch",
                "balance_loss_scope", "must be micro_batch or global_batch");
  section.check(train.choice_bias_rate >= 0, "choice_bias_rate", "must not be negative");
  train.balance_loss_choices = balance_choices_from_name(balance_loss_choices);
  section.check(train.dtype == "fp32" || train.dtype == "bf16", "dtype", "must be fp32 or bf16");
  return train;
}

ParallelSettings parse_parallel(const Json& root) {
  ParallelSettings parallel;
  Section section(root, "parallel");
  section.take("zero_stage", parallel.zero_stage);
  section.take("reduce_bucket_size", parallel.reduce_bucket_size);
  Json expert_parallel;
  std::string all_to_all;
  section.take("moments_dtype", parallel.states.moments_dtype);
  section.take("offload_optimizer", parallel.states.offload_path);
  section.take("expert_parallel", expert_parallel);
  section.take("ranks_per_node", parallel.experts.ranks_per_node);
  section.take("all_to_all", all_to_all);
  section.ignore("timeout_s");
  section.finish();
  parallel.experts.expert_parallel = expert_parallel_from_json(expert_parallel.dump());
  parallel.experts.all_to_all = all_to_all_algorithm_from_name(all_to_all);
  section.check(parallel.experts.ranks_per_node >= 0, "ranks_per_node", "must not be negative");
  section.check(parallel.zero_stage >= 0 && parallel.zero_stage <= 2, "zero_stage", "must be 0, 1 or 2");
  section.check(parallel.states.moments_dtype == "fp32" || parallel.states.moments_dtype == "bf16", "moments_dtype",
                "must be fp32 or bf16");
  section.check(parallel.reduce_bucket_size > 0, "reduce_bucket_size", "must be positive");
  return parallel;
}

DistillSettings parse_distill(const Json& root) {
  DistillSettings distill;
  Section section(root, "distill");
  std::string student_init;
  section.take("teacher", distill.teacher);
  section.take("alpha", distill.alpha);
  section.take("temperature", distill.temperature);
  section.take("stop_at", distill.stop_at);
  section.take("student_init", student_init);
  section.take("drop_layers", distill.drop_layers);
  section.finish();
  section.check(student_init == "teacher" || student_init == "random", "student_init", "must be teacher or random");
  section.check(distill.temperature > 0, "temperature", "must be positive");
  section.check(distill.stop_at > 0, "stop_at", "must be positive");
  distill.student_from_teacher = student_init == "teacher";
  return distill;
}

}  // namespace

int64_t TrainSettings::total_steps(int64_t sequence_length) const {
  const int64_t tokens_per_step = batch_size * sequence_length;
  return ceil_div(tokens, tokens_per_step);
}

int64_t DistillSettings::stop_step(int64_t total_steps) const {
  if (stop_at > 1.0) return static_cast<int64_t>(stop_at);
  return static_cast<int64_t>(std::llround(stop_at * static_cast<double>(total_steps)));
}

RunSettings RunSettings::from_json(const std::string& text) {
  const Json root = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) throw InvalidArgument("settings: not a JSON object");
  RunSettings settings{parse_data(root), parse_train(root), parse_parallel(root), std::nullopt};
  if (root.contains("distill") && !root["distill"].is_null()) settings.distill = parse_distill(root);
  return settings;
}

double learning_rate_at(const TrainSettings& settings, int64_t tokens) {
  if (tokens <= settings.warmup_tokens) {
    return settings.learning_rate * static_cast<double>(tokens) / static_cast<double>(settings.warmup_tokens);
  }
  const double span = static_cast<double>(std::max<int64_t>(1, settings.decay_tokens - settings.warmup_tokens));
  const double done = std::min(1.0, static_cast<double>(tokens - settings.warmup_tokens) / span);
  const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * done));
  return settings.min_learning_rate + (settings.learning_rate - settings.min_learning_rate) * cosine;
}

}  // namespace coterie
