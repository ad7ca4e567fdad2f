#include "train/adamw.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace coterie {
namespace {

// Masters share the parameter's memory where no rounding stands between them.
at::Tensor master_of(const at::Tensor& parameter) {
  return parameter.scalar_type() == at::kFloat ? parameter.detach() : parameter.detach().to(at::kFloat);
}

std::vector<at::Tensor> select(const std::vector<at::Tensor>& tensors, const std::vector<size_t>& members) {
  std::vector<at::Tensor> selected;
  for (size_t i : members) selected.push_back(tensors[i]);
  return selected;
}

}  // namespace

AdamW::AdamW(const std::vector<Parameter>& parameters, const TrainSettings& settings)
    : parameters_(parameters), settings_(settings), gradients_(parameters.size()) {
  groups_ = {{settings.weight_decay, {}}, {0.0, {}}};
  for (size_t i = 0; i < parameters.size(); ++i) {
    masters_.push_back(master_of(parameters[i].tensor));
    exp_avg_.push_back(at::zeros_like(masters_[i]));
    exp_avg_sq_.push_back(at::zeros_like(masters_[i]));
    if (!parameters[i].tensor.requires_grad()) continue;  // kept and saved with the others, but not trained
    const std::string& name = parameters[i].name;
    const bool decays = parameters[i].tensor.dim() >= 2 && !name.ends_with(".bias");
    groups_[decays ? 0 : 1].members.push_back(i);
  }
}

void AdamW::accumulate_gradients() {
  c10::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    at::Tensor& grad = parameters_[i].tensor.mutable_grad();
    // A parameter that no token reached (an expert layer that was never built, say) has none: zero.
    at::Tensor part = grad.defined() ? grad.to(at::kFloat) : at::zeros_like(masters_[i]);
    gradients_[i] = gradients_[i].defined() ? gradients_[i].add_(part) : part;
    grad.reset();
  }
}

double AdamW::step(double learning_rate) {
  c10::NoGradGuard no_grad;
  ++num_steps_;
  const double norm = at::stack(at::_foreach_norm(gradients_)).norm().item<double>();
  if (settings_.max_grad_norm > 0 && norm > settings_.max_grad_norm) {
    at::_foreach_mul_(gradients_, settings_.max_grad_norm / norm);
  }
  for (const Group& group : groups_) {
    const std::vector<at::Tensor> steps(group.members.size(), at::scalar_tensor(num_steps_, at::kFloat));
    at::_fused_adamw_(select(masters_, group.members), select(gradients_, group.members),
                      select(exp_avg_, group.members), select(exp_avg_sq_, group.members), /*max_exp_avg_sqs=*/{},
                      steps, learning_rate, settings_.beta1, settings_.beta2, group.weight_decay, settings_.eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  }
  for (at::Tensor& gradient : gradients_) gradient.reset();
  publish_masters();
  return norm;
}

void AdamW::visit_masters(const std::function<void(const std::string&, const at::Tensor&)>& visit) const {
  for (size_t i = 0; i < parameters_.size(); ++i) visit(parameters_[i].name, masters_[i]);
}

void AdamW::visit_moments(const std::function<void(const std::string&, const at::Tensor&)>& visit) const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    visit(parameters_[i].name + ".exp_avg", exp_avg_[i]);
    visit(parameters_[i].name + ".exp_avg_sq", exp_avg_sq_[i]);
  }
}

void AdamW::publish_masters() {
  c10::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (!masters_[i].is_alias_of(parameters_[i].tensor)) at::Tensor(parameters_[i].tensor).copy_(masters_[i]);
  }
}

}  // namespace coterie
