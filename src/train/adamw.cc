#include "train/adamw.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "comm/process_group.h"
#include "kernels/kernel_table.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

// Masters share the parameter's memory where no rounding stands between them.
at::Tensor master_of(const at::Tensor& parameter) {
  return parameter.scalar_type() == at::kFloat ? parameter.detach() : parameter.detach().to(at::kFloat);
}

// Elements of a task, about 20 us; and of a partial sum of squares, whose order is thereby fixed.
constexpr int64_t kChunk = 16 << 10;

const void* element(const at::Tensor& tensor, int64_t index) {
  return static_cast<const char*>(tensor.const_data_ptr()) + index * static_cast<int64_t>(tensor.element_size());
}

}  // namespace

AdamW::AdamW(const std::vector<Parameter>& parameters, const TrainSettings& settings)
    : parameters_(parameters), settings_(settings), gradients_(parameters.size()) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    masters_.push_back(master_of(parameters[i].tensor));
    exp_avg_.push_back(at::zeros_like(masters_[i]));
    exp_avg_sq_.push_back(at::zeros_like(masters_[i]));
  }
}

bool AdamW::decays(size_t parameter) const {
  return parameters_[parameter].tensor.dim() >= 2 && !parameters_[parameter].name.ends_with(".bias");
}

void AdamW::accumulate_gradients() {
  c10::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    at::Tensor& grad = parameters_[i].tensor.mutable_grad();
    if (!grad.defined()) continue;  // a parameter that no token reached (an expert layer that was never built, say)
    // The first part stays as it came; from the second on the sum is fp32.
    gradients_[i] = gradients_[i].defined() ? gradients_[i].to(at::kFloat).add_(grad) : grad.contiguous();
    grad.reset();
  }
}

double AdamW::step(double learning_rate) {
  c10::NoGradGuard no_grad;
  ++num_steps_;
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (!parameters_[i].tensor.requires_grad()) continue;  // kept and saved with the others, but not trained
    const int64_t size = masters_[i].numel();
    for (int64_t first = 0; first < size; first += kChunk) chunks.push_back({i, first, std::min(kChunk, size - first)});
  }
  const double norm = gradient_norm(chunks);
  const bool clips = settings_.max_grad_norm > 0 && norm > settings_.max_grad_norm;
  const auto steps = static_cast<double>(num_steps_);
  AdamWFactors factors{.grad_scale = clips ? static_cast<float>(settings_.max_grad_norm / norm) : 1.0f,
                       .beta1 = static_cast<float>(settings_.beta1),
                       .beta2 = static_cast<float>(settings_.beta2)};
  factors.step_size = static_cast<float>(learning_rate / (1.0 - std::pow(settings_.beta1, steps)));
  factors.inverse_root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(settings_.beta2, steps)));
  factors.eps = static_cast<float>(settings_.eps);
  const auto decay = static_cast<float>(1.0 - learning_rate * settings_.weight_decay);
  torch_pool().run(static_cast<int64_t>(chunks.size()), [&](int64_t task, int) {
    const Chunk& chunk = chunks[static_cast<size_t>(task)];
    AdamWFactors own = factors;
    own.decay = decays(chunk.parameter) ? decay : 1.0f;
    update(chunk, own);
  });
  for (at::Tensor& gradient : gradients_) gradient.reset();
  return norm;
}

double AdamW::gradient_norm(const std::vector<Chunk>& chunks) const {
  std::vector<float> sums(chunks.size(), 0.0f);
  torch_pool().run(static_cast<int64_t>(chunks.size()), [&](int64_t task, int) {
    const Chunk& chunk = chunks[static_cast<size_t>(task)];
    const at::Tensor& gradient = gradients_[chunk.parameter];
    if (!gradient.defined()) return;
    sums[static_cast<size_t>(task)] =
        active_kernels().square_sum_row(element(gradient, chunk.first), dtype_of(gradient), chunk.count);
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

void AdamW::update(const Chunk& chunk, const AdamWFactors& factors) const {
  const auto [i, first, count] = chunk;
  const at::Tensor &parameter = parameters_[i].tensor, &gradient = gradients_[i];
  AdamWRow row{.factors = factors,
               .master = masters_[i].mutable_data_ptr<float>() + first,
               .exp_avg = exp_avg_[i].mutable_data_ptr<float>() + first,
               .exp_avg_sq = exp_avg_sq_[i].mutable_data_ptr<float>() + first,
               .n = count};
  if (gradient.defined()) row.grad = element(gradient, first);
  if (gradient.defined()) row.grad_dtype = dtype_of(gradient);
  if (parameter.scalar_type() == at::kBFloat16) row.parameter = parameter.mutable_data_ptr<at::BFloat16>() + first;
  active_kernels().adamw_row(row);
}

std::vector<StateView> AdamW::state_views() const {
  std::vector<StateView> views;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& parameter = parameters_[i];
    StateView view{.name = parameter.name, .shape = parameter.tensor.sizes().vec(), .values = masters_[i]};
    if (parameter.logical_rows > 0) {
      view.first_element = parameter.first_row * parameter.tensor.stride(0);
      view.shape[0] = parameter.logical_rows;
    }
    view.writes = !parameter.replicas || parameter.replicas->rank() == 0;
    views.push_back(view);
    for (const auto& [kind, moments] : {std::pair("exp_avg", &exp_avg_), {"exp_avg_sq", &exp_avg_sq_}}) {
      view.name = std::string("optimizer.") + kind + "." + parameter.name;
      view.values = (*moments)[i];
      views.push_back(view);
    }
  }
  return views;
}

void AdamW::publish_masters() {
  c10::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (!masters_[i].is_alias_of(parameters_[i].tensor)) at::Tensor(parameters_[i].tensor).copy_(masters_[i]);
  }
}

}  // namespace coterie
