#include "train/zero_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/philox.h"
#include "comm/small_sums.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

// Elements of a task, about 20 us; and of a partial sum of squares, whose order is thereby fixed.
constexpr int64_t kChunk = 16 << 10;

class GradientHook final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit GradientHook(std::function<void()> call) : call_(std::move(call)) {}
  void operator()(const at::Tensor& /*parameter*/) override { call_(); }

 private:
  std::function<void()> call_;
};

std::vector<SizedParameter> sizes_of(const std::vector<Parameter>& parameters) {
  std::map<ProcessGroup*, int64_t> ids;
  std::vector<SizedParameter> sizes;
  for (const Parameter& p : parameters) {
    sizes.push_back({p.tensor.numel(), dtype_of(p.tensor), p.tensor.requires_grad()});
    if (!p.replicas) continue;
    const int64_t id = ids.try_emplace(p.replicas, static_cast<int64_t>(ids.size())).first->second;
    sizes.back().replicas = {id, p.replicas->size(), p.replicas->rank()};
  }
  return sizes;
}

int64_t bytes_of(const at::Tensor& tensor) { return tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0; }

// The element of a bucket in a tensor that is of all of it, or of the own partition alone.
template <typename Bucket>
char* element(const Bucket& bucket, const at::Tensor& tensor, int64_t index) {
  const int64_t begin = tensor.numel() == bucket.size ? 0 : bucket.own_begin;
  return static_cast<char*>(tensor.mutable_data_ptr()) + (index - begin) * static_cast<int64_t>(tensor.element_size());
}

template <typename Bucket>
at::Tensor own_part(const Bucket& bucket, const at::Tensor& tensor) {
  return tensor.numel() == bucket.size ? tensor.narrow(0, bucket.own_begin, bucket.share) : tensor;
}

AdamWFactors factors_of(const AdamWSettings& settings, int64_t num_steps, double grad_scale) {
  const auto steps = static_cast<double>(num_steps);
  AdamWFactors factors{.grad_scale = static_cast<float>(grad_scale),
                       .beta1 = static_cast<float>(settings.beta1),
                       .beta2 = static_cast<float>(settings.beta2)};
  if (settings.decoupled) {
    factors.decay = static_cast<float>(1.0 - settings.learning_rate * settings.weight_decay);
  } else {
    factors.l2 = static_cast<float>(settings.weight_decay);
  }
  factors.step_size = static_cast<float>(settings.learning_rate / (1.0 - std::pow(settings.beta1, steps)));
  factors.inverse_root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(settings.beta2, steps)));
  factors.eps = static_cast<float>(settings.eps);
  return factors;
}

// Its memory was written to through another tensor or a pointer.
void tell_torch_of_change(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

ZeroOptimizer::ZeroOptimizer(const std::vector<Parameter>& parameters, int64_t gradient_accumulation_steps,
                             const ParallelSettings& parallel, ProcessGroup* world)
    : parameters_(parameters),
      passes_per_step_(gradient_accumulation_steps),
      stage_(parallel.zero_stage),
      states_(parallel.states),
      world_(world) {
  c10::NoGradGuard no_grad;
  for (const ZeroBucket& layout : zero_buckets(sizes_of(parameters), parallel.reduce_bucket_size)) make_bucket(layout);
  for (Bucket& bucket : buckets_) make_states(bucket);
  make_chunks();
  set_hooks();
}

ZeroOptimizer::~ZeroOptimizer() {
  for (const Bucket& bucket : buckets_) {
    if (!bucket.ranks) continue;
    for (const ZeroSlot& slot : bucket.slots)
      torch::autograd::impl::set_post_acc_grad_hooks(parameters_[slot.parameter].tensor, nullptr);
  }
}

void ZeroOptimizer::make_bucket(const ZeroBucket& layout) {
  Bucket& bucket = buckets_.emplace_back(Bucket{layout});
  const Parameter& last = parameters_[layout.slots.back().parameter];
  bucket.name = last.name + (layout.slots.size() > 1 ? " and others" : "");
  bucket.filled.resize(layout.slots.size());
  if (layout.shared) bucket.ranks = last.replicas;
  bucket.weights = layout.shared ? moved_weights(layout) : last.tensor.detach().view({-1});
}

at::Tensor ZeroOptimizer::moved_weights(const ZeroBucket& layout) const {
  at::Tensor weights = at::zeros({layout.size}, parameters_[layout.slots[0].parameter].tensor.scalar_type());
  for (const ZeroSlot& slot : layout.slots) {
    const at::Tensor& tensor = parameters_[slot.parameter].tensor;
    const at::Tensor place = weights.narrow(0, slot.offset, slot.size).view(tensor.sizes());
    place.copy_(tensor);
    tensor.set_data(place);
  }
  return weights;
}

void ZeroOptimizer::make_states(Bucket& bucket) const {
  const ZeroRange held = bucket.states(stage_);
  const at::Tensor trained = bucket.weights.narrow(0, held.begin, held.size);
  const at::ScalarType moments = states_.moments_dtype == "bf16" ? at::kBFloat16 : at::kFloat;
  bucket.masters = trained.scalar_type() == at::kFloat
                       ? bucket.weights
                       : make_state(held.size, at::kFloat, states_.offload_path).copy_(trained);
  bucket.exp_avg = make_state(held.size, moments, states_.offload_path);
  bucket.exp_avg_sq = make_state(held.size, moments, states_.offload_path);
}

void ZeroOptimizer::make_chunks() {
  for (size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    const auto cut = [&](int64_t begin, int64_t end, std::vector<Chunk>& chunks) {
      for (const ZeroSlot& slot : bucket.slots) {
        if (!parameters_[slot.parameter].tensor.requires_grad()) continue;  // kept and saved, but not trained
        const int64_t last = std::min(end, slot.offset + slot.size);
        for (int64_t first = std::max(begin, slot.offset); first < last; first += kChunk)
          chunks.push_back({b, slot.parameter, first, std::min(kChunk, last - first)});
      }
    };
    cut(bucket.own_begin, bucket.own_begin + bucket.share, own_chunks_);
    if (stage_ == 0) cut(0, bucket.size, update_chunks_);
  }
  if (stage_ > 0) update_chunks_ = own_chunks_;
}

void ZeroOptimizer::set_hooks() {
  for (Bucket& bucket : buckets_) {
    if (!bucket.ranks) continue;
    for (size_t s = 0; s < bucket.slots.size(); ++s) {
      auto hook = std::make_unique<GradientHook>([this, &bucket, s] {
        take_gradient(bucket, s);
        begin_ready_sums();
      });
      torch::autograd::impl::set_post_acc_grad_hooks(parameters_[bucket.slots[s].parameter].tensor, std::move(hook));
    }
  }
}

bool ZeroOptimizer::sums_in_this_pass() const { return stage_ == 2 || passes_ + 1 == passes_per_step_; }

at::Tensor ZeroOptimizer::empty_gradients(const Bucket& bucket) const {
  const DType dtype = gradient_dtype(bucket, stage_, passes_per_step_);
  return at::empty({bucket.size}, dtype == DType::kF32 ? at::kFloat : at::kBFloat16);
}

void ZeroOptimizer::take_gradient(Bucket& bucket, size_t index) {
  c10::NoGradGuard no_grad;
  const ZeroSlot& slot = bucket.slots[index];
  at::Tensor& grad = parameters_[slot.parameter].tensor.mutable_grad();
  if (!bucket.gradients.defined()) bucket.gradients = empty_gradients(bucket);
  const at::Tensor place = bucket.gradients.narrow(0, slot.offset, slot.size).view(grad.sizes());
  bucket.filled[index] ? place.add_(grad) : place.copy_(grad);
  bucket.filled[index] = true;
  watch_();
  grad.reset();
  ++bucket.num_filled;
  bucket.ranks->progress();
}

// The first part stays as it came; from the second on the sum is fp32.
void ZeroOptimizer::take_local_gradient(Bucket& bucket) const {
  at::Tensor& grad = parameters_[bucket.slots[0].parameter].tensor.mutable_grad();
  if (!grad.defined()) return;  // a parameter that no token reached (an expert layer that was never built, say)
  const at::Tensor flat = grad.contiguous().view({-1});
  bucket.sum = bucket.sum.defined() ? bucket.sum.to(at::kFloat).add_(flat) : flat;
  grad.reset();
}

// In the order of the buckets, whatever the order in which autograd finishes them.
void ZeroOptimizer::begin_ready_sums() {
  if (!sums_in_this_pass()) return;
  for (; next_sum_ < buckets_.size(); ++next_sum_) {
    Bucket& bucket = buckets_[next_sum_];
    if (!bucket.ranks || bucket.num_filled < bucket.slots.size()) return;
    begin_sum(bucket);
    if (next_sum_ >= kMaxSumsUnderWay) finish_sum(buckets_[next_sum_ - kMaxSumsUnderWay]);
  }
}

void ZeroOptimizer::begin_sum(Bucket& bucket) const {
  if (!bucket.gradients.defined()) bucket.gradients = empty_gradients(bucket);
  int64_t end = 0;  // of what is known
  for (size_t s = 0; s < bucket.slots.size(); ++s) {
    const ZeroSlot& slot = bucket.slots[s];
    bucket.gradients.narrow(0, end, slot.offset - end).zero_();
    if (!bucket.filled[s]) bucket.gradients.narrow(0, slot.offset, slot.size).zero_();
    end = slot.offset + slot.size;
  }
  bucket.gradients.narrow(0, end, bucket.size - end).zero_();
  void* const data = bucket.gradients.mutable_data_ptr();
  const DType dtype = dtype_of(bucket.gradients);
  const std::string label = "gradients of " + bucket.name;
  if (stage_ == 0) {
    bucket.work = bucket.ranks->start_all_reduce(data, bucket.size, dtype, ReduceOp::kSum, label);
  } else {
    void* const own = element(bucket, bucket.gradients, bucket.own_begin);
    bucket.work = bucket.ranks->start_reduce_scatter(data, own, bucket.share, dtype, ReduceOp::kSum, label);
  }
}

// Does nothing the second time.
void ZeroOptimizer::finish_sum(Bucket& bucket) const {
  if (!bucket.gradients.defined()) return;
  bucket.work.wait();
  if (stage_ < 2) {
    bucket.sum = bucket.gradients;
  } else {
    const at::Tensor own = own_part(bucket, bucket.gradients);
    bucket.sum = bucket.sum.defined() ? bucket.sum.to(at::kFloat).add_(own) : own.clone();
    watch_();
  }
  bucket.gradients.reset();
  bucket.filled.assign(bucket.slots.size(), false);
}

void ZeroOptimizer::accumulate_gradients() {
  c10::NoGradGuard no_grad;
  watch_();
  for (Bucket& bucket : buckets_) {
    if (!bucket.ranks) {
      take_local_gradient(bucket);
      continue;
    }
    for (size_t s = 0; s < bucket.slots.size(); ++s) {
      if (parameters_[bucket.slots[s].parameter].tensor.grad().defined()) take_gradient(bucket, s);
    }
    bucket.num_filled = bucket.slots.size();  // what has no gradient now has none in this pass
  }
  begin_ready_sums();
  if (sums_in_this_pass()) {
    for (Bucket& bucket : buckets_) {
      if (bucket.ranks) finish_sum(bucket);
    }
  }
  for (Bucket& bucket : buckets_) bucket.num_filled = 0;
  next_sum_ = 0;
  ++passes_;
}

double ZeroOptimizer::step(const std::vector<AdamWSettings>& settings, double max_grad_norm, bool skips_overflow,
                           const Inspect& inspect) {
  c10::NoGradGuard no_grad;
  COTERIE_CHECK(settings.size() == parameters_.size(), "settings of every parameter");
  COTERIE_CHECK(buckets_.empty() || !buckets_[0].ranks || passes_ == passes_per_step_,
                "the last pass of a step sums over the ranks");
  passes_ = 0;
  double norm = gradient_norm();
  if (inspect) inspect(norm);
  if (skips_overflow && !std::isfinite(norm)) {
    for (Bucket& bucket : buckets_) bucket.sum.reset();
    return norm;
  }
  ++num_steps_;
  const double grad_scale = max_grad_norm > 0 && norm > max_grad_norm ? max_grad_norm / norm : 1.0;
  std::vector<AdamWFactors> factors;
  for (const AdamWSettings& s : settings) factors.push_back(factors_of(s, num_steps_, grad_scale));
  torch_pool().run(static_cast<int64_t>(update_chunks_.size()), [&](int64_t task, int) {
    const Chunk& chunk = update_chunks_[static_cast<size_t>(task)];
    update(chunk, factors[chunk.parameter]);
  });
  for (Bucket& bucket : buckets_) bucket.sum.reset();
  gather_weights();
  for (const Parameter& p : parameters_) {
    if (p.tensor.requires_grad()) tell_torch_of_change(p.tensor);
  }
  return norm;
}

double ZeroOptimizer::gradient_norm() const {
  std::vector<float> sums(own_chunks_.size(), 0.0f);
  torch_pool().run(static_cast<int64_t>(own_chunks_.size()), [&](int64_t task, int) {
    const Chunk& chunk = own_chunks_[static_cast<size_t>(task)];
    const Bucket& bucket = buckets_[chunk.bucket];
    if (!bucket.sum.defined()) return;
    sums[static_cast<size_t>(task)] =
        active_kernels().square_sum_row(element(bucket, bucket.sum, chunk.first), dtype_of(bucket.sum), chunk.count);
  });
  double squares = std::accumulate(sums.begin(), sums.end(), 0.0);
  sum_over_ranks(world_, {&squares, 1}, "gradient norm");
  return std::sqrt(squares);
}

void ZeroOptimizer::update(const Chunk& chunk, const AdamWFactors& factors) const {
  const Bucket& bucket = buckets_[chunk.bucket];
  AdamWRow row{.factors = factors,
               .master = reinterpret_cast<float*>(element(bucket, bucket.masters, chunk.first)),
               .n = chunk.count};
  if (bucket.sum.defined()) {
    row.grad = element(bucket, bucket.sum, chunk.first);
    row.grad_dtype = dtype_of(bucket.sum);
  }
  if (bucket.weights.scalar_type() == at::kBFloat16) row.parameter = element(bucket, bucket.weights, chunk.first);
  char* const exp_avg = element(bucket, bucket.exp_avg, chunk.first);
  char* const exp_avg_sq = element(bucket, bucket.exp_avg_sq, chunk.first);
  if (bucket.exp_avg.scalar_type() == at::kBFloat16) {
    const uint64_t place = static_cast<uint64_t>(chunk.parameter) << 40 | static_cast<uint64_t>(chunk.first);
    const uint32_t key = philox(/*key=*/0, static_cast<uint64_t>(num_steps_), place)[0];
    adamw_row_bf16_moments(row, reinterpret_cast<BFloat16*>(exp_avg), reinterpret_cast<BFloat16*>(exp_avg_sq), key);
    return;
  }
  row.exp_avg = reinterpret_cast<float*>(exp_avg);
  row.exp_avg_sq = reinterpret_cast<float*>(exp_avg_sq);
  active_kernels().adamw_row(row);
}

// Every rank has updated its own partition.
void ZeroOptimizer::gather_weights() {
  if (stage_ == 0) return;
  for (Bucket& bucket : buckets_) {
    if (!bucket.ranks) continue;
    const int64_t bytes = bucket.share * static_cast<int64_t>(bucket.weights.element_size());
    bucket.work = bucket.ranks->start_all_gather(element(bucket, bucket.weights, bucket.own_begin),
                                                 bucket.weights.mutable_data_ptr(), bytes, "weights of " + bucket.name);
  }
  for (Bucket& bucket : buckets_) bucket.work.wait();
}

std::vector<StateView> ZeroOptimizer::state_views() const {
  std::vector<StateView> views;
  for (const Bucket& bucket : buckets_) {
    for (const ZeroSlot& slot : bucket.slots) {
      const Stretch own = own_stretch(bucket, slot);
      if (own.count <= 0) continue;
      const auto add = [&](const std::string& prefix, const at::Tensor& state) {
        StateView& view = views.emplace_back(own.view);
        view.name = prefix + view.name;
        view.values = values_of(bucket, own, state);
      };
      add("", bucket.masters);
      add("optimizer.exp_avg.", bucket.exp_avg);
      add("optimizer.exp_avg_sq.", bucket.exp_avg_sq);
    }
  }
  return views;
}

std::vector<StateView> ZeroOptimizer::gradient_views() const {
  std::vector<StateView> views;
  for (const Bucket& bucket : buckets_) {
    for (const ZeroSlot& slot : bucket.slots) {
      const Stretch own = own_stretch(bucket, slot);
      if (own.count <= 0 || !parameters_[slot.parameter].tensor.requires_grad()) continue;
      StateView& view = views.emplace_back(own.view);
      view.values = bucket.sum.defined() ? values_of(bucket, own, bucket.sum) : at::zeros({own.count}, at::kFloat);
    }
  }
  return views;
}

ZeroOptimizer::Stretch ZeroOptimizer::own_stretch(const Bucket& bucket, const ZeroSlot& slot) const {
  const Parameter& parameter = parameters_[slot.parameter];
  const auto [begin, size] = bucket.states(stage_);
  Stretch own{.view = {.name = parameter.name, .shape = parameter.logical_shape, .order = parameter.order},
              .first = std::max(begin, slot.offset)};
  own.count = std::min(begin + size, slot.offset + slot.size) - own.first;
  own.view.first_element = parameter.first_element + own.first - slot.offset;
  const bool alone = bucket.shared && stage_ > 0;  // with its stretch
  own.view.writes = alone || !parameter.replicas || parameter.replicas->rank() == 0;
  return own;
}

at::Tensor ZeroOptimizer::values_of(const Bucket& bucket, const Stretch& stretch, const at::Tensor& tensor) {
  const int64_t begin = tensor.numel() == bucket.size ? 0 : bucket.own_begin;
  return tensor.narrow(0, stretch.first - begin, stretch.count);
}

void ZeroOptimizer::publish_masters() {
  c10::NoGradGuard no_grad;
  for (const Bucket& bucket : buckets_) {
    if (bucket.masters.is_alias_of(bucket.weights)) continue;
    const bool whole = bucket.masters.numel() == bucket.size;
    (whole ? bucket.weights : own_part(bucket, bucket.weights)).copy_(bucket.masters);
  }
  gather_weights();
  for (const Parameter& p : parameters_) tell_torch_of_change(p.tensor);
}

TrainingBytes ZeroOptimizer::held_bytes() const {
  TrainingBytes bytes;
  for (const Bucket& bucket : buckets_) {
    bytes.weights += bytes_of(bucket.weights);
    bytes.gradients += bytes_of(bucket.gradients) + bytes_of(bucket.sum);
    for (const ZeroSlot& slot : bucket.slots) bytes.gradients += bytes_of(parameters_[slot.parameter].tensor.grad());
    if (!bucket.masters.is_alias_of(bucket.weights)) bytes.masters += bytes_of(bucket.masters);
    bytes.moments += bytes_of(bucket.exp_avg) + bytes_of(bucket.exp_avg_sq);
  }
  return bytes;
}

}  // namespace coterie
