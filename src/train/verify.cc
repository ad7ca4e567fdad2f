#include "train/verify.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <vector>

#include "comm/small_sums.h"
#include "train/trainer.h"

namespace coterie {
namespace {

// Of the model's typical gradient element, which a tensor's elements count as at least.
constexpr double kLeastElement = 0.01;

RunSettings at_full_learning_rate(RunSettings settings) {
  settings.train.warmup_tokens = 0;
  return settings;
}

// What one rank found out in a step.
struct Step {
  Step(Trainer& trainer, const VerifyFaults& faults) {
    metrics = trainer.step([&](double& norm) {
      if (faults.before_update) faults.before_update(trainer, norm);
      for (StateView& view : trainer.optimizer().gradient_views()) {
        view.values = view.values.to(at::kFloat, false, /*copy=*/true);
        gradients.push_back(view);
      }
      norm_seen = norm;
    });
    if (faults.after_update) faults.after_update(trainer);
  }

  StepMetrics metrics;
  double norm_seen = 0;
  std::vector<StateView> gradients;  // copies
};

// The step on one rank, of which rank 0 tells the others.
class Reference {
 public:
  Reference(const ModelConfig& config, const RunSettings& settings, ProcessGroup& world) : world_(world) {
    if (world_.rank() > 0) return;
    trainer_ = std::make_unique<Trainer>(config, settings);
    step_.emplace(*trainer_, VerifyFaults{});
    for (const StateView& view : step_->gradients) gradients_[view.name] = view.values;
    for (const Parameter& parameter : trainer_->model().parameters()) weights_[parameter.name] = parameter.tensor;
  }

  // Collective, as all that follow.
  double loss() const { return told({step_ ? step_->metrics.loss : 0.0}, "loss"); }
  double norm() const { return told({step_ ? step_->norm_seen : 0.0}, "norm"); }
  at::Tensor gradient(const Parameter& parameter) const { return told(parameter, gradients_); }
  at::Tensor weights(const Parameter& parameter) const { return told(parameter, weights_); }

 private:
  double told(double value, const char* label) const {
    world_.broadcast(&value, sizeof(value), /*root=*/0, label);
    return value;
  }

  // fp32, of the logical tensor's shape.
  at::Tensor told(const Parameter& parameter, const std::map<std::string, at::Tensor>& tensors) const {
    const std::vector<int64_t>& shape = parameter.logical_shape;
    const at::Tensor value = world_.rank() == 0 ? tensors.at(parameter.name).to(at::kFloat).reshape(shape).contiguous()
                                                : at::empty(shape, at::kFloat);
    world_.broadcast(value.mutable_data_ptr(), value.numel() * static_cast<int64_t>(sizeof(float)), 0, parameter.name);
    return value;
  }

  ProcessGroup& world_;
  std::unique_ptr<Trainer> trainer_;
  std::optional<Step> step_;
  std::map<std::string, at::Tensor> gradients_, weights_;  // by logical name
};

class Comparison {
 public:
  Comparison(const Trainer& trainer, const Step& step, const RunSettings& settings, const Reference& reference,
             ProcessGroup& world)
      : parameters_(trainer.model().parameters()),
        step_(step),
        reference_(reference),
        world_(world),
        bf16_(settings.train.dtype == "bf16"),
        tolerance_(VerifyTolerance::of(settings.train.dtype)),
        norm_(reference.norm()) {}

  VerifyReport run() {
    VerifyReport report;
    const double loss = reference_.loss();
    report.loss = std::abs(step_.metrics.loss - loss) / std::abs(loss);
    report.norm = std::abs(step_.norm_seen - norm_) / norm_;
    for (const Parameter& parameter : parameters_) look_at(parameter);
    sum_over_ranks(&world_, squares_, "gradient errors");
    sum_over_ranks(&world_, counted_, "gradient elements");
    const auto count = static_cast<int64_t>(weight_errors_.size());
    world_.all_reduce(weight_errors_.data(), count, DType::kF32, ReduceOp::kMax, "weight errors");
    double elements = 0;
    for (const double size : sizes_) elements += size;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      keep_worst(report.weight, i, weight_errors_[i]);
      if (sizes_[i] == 0) continue;  // it has no gradient
      const double least = kLeastElement * norm_ * std::sqrt(sizes_[i] / elements);
      keep_worst(report.gradient, i, std::sqrt(squares_[i]) / std::max(gradient_norms_[i], least));
      keep_worst(report.uncounted, i, std::abs(counted_[i] - sizes_[i]));
    }
    return report;
  }

 private:
  void keep_worst(WorstTensor& worst, size_t i, double error) const {
    if (error > worst.error || std::isnan(error)) worst = {parameters_[i].name, error};
  }

  void look_at(const Parameter& parameter) {
    at::Tensor weights = reference_.weights(parameter), gradient;
    if (parameter.tensor.requires_grad()) {
      gradient = reference_.gradient(parameter);
    } else if (bf16_) {  // what the loads of single tokens decide: alike on all ranks, at least
      weights = parameter.tensor.detach().clone();
      world_.broadcast(weights.mutable_data_ptr(), weights.numel() * static_cast<int64_t>(sizeof(float)), 0,
                       parameter.name);
    }
    double squares = 0, counted = 0;
    for (const StateView& view : step_.gradients) {
      if (view.name != parameter.name) continue;
      const at::Tensor expected = in_order(gradient, view.order).narrow(0, view.first_element, view.values.numel());
      squares += (view.values - expected).square().sum().item<double>();
      if (view.writes) counted += static_cast<double>(view.values.numel());
    }
    squares_.push_back(squares);
    counted_.push_back(counted);
    sizes_.push_back(gradient.defined() ? static_cast<double>(gradient.numel()) : 0.0);
    gradient_norms_.push_back(gradient.defined() ? gradient.norm().item<double>() : 0.0);
    weight_errors_.push_back(weight_error(parameter, weights, gradient));
  }

  float weight_error(const Parameter& parameter, const at::Tensor& weights, const at::Tensor& gradient) const {
    const at::Tensor expected = own_part(parameter, weights);
    const double rounding = parameter.tensor.scalar_type() == at::kBFloat16 ? 0x1p-7 : 0x1p-22;
    at::Tensor beyond = (parameter.tensor.detach() - expected).abs() - rounding * expected.abs();
    if (gradient.defined()) {
      const double least = std::min(100 * tolerance_.gradient, 0.2) * gradient.abs().max().item<double>();
      beyond = beyond.masked_fill(own_part(parameter, gradient).abs() < least, 0.0);
    }
    if (beyond.numel() == 0) return 0;
    return static_cast<float>(std::max(0.0, beyond.max().item<double>()) / step_.metrics.learning_rate);
  }

  const std::vector<Parameter>& parameters_;
  const Step& step_;
  const Reference& reference_;
  ProcessGroup& world_;
  const bool bf16_;
  const VerifyTolerance tolerance_;
  const double norm_;
  // Per parameter: sums over the ranks, in the end; what the reference has; the largest over the ranks.
  std::vector<double> squares_, counted_, sizes_, gradient_norms_;
  std::vector<float> weight_errors_;
};

}  // namespace

VerifyTolerance VerifyTolerance::of(const std::string& dtype) {
  if (dtype == "bf16") return {.loss = 1e-2, .gradient = 0.1, .norm = 0.02, .weight = 0.02};
  return {.loss = 1e-5, .gradient = 1e-4, .norm = 1e-5, .weight = 0.02};
}

VerifyReport verify_step(const ModelConfig& config, const RunSettings& settings, ProcessGroup& world,
                         const VerifyFaults& faults) {
  const RunSettings same = at_full_learning_rate(settings);
  const Reference reference(config, same, world);
  Trainer trainer(config, same, &world);
  const Step step(trainer, faults);
  const c10::NoGradGuard no_grad;
  return Comparison(trainer, step, same, reference, world).run();
}

bool within(const VerifyReport& report, const VerifyTolerance& tolerance) {
  return report.loss <= tolerance.loss && report.gradient.error <= tolerance.gradient &&
         report.norm <= tolerance.norm && report.weight.error <= tolerance.weight && report.uncounted.error == 0;
}

}  // namespace coterie
