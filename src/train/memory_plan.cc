#include "train/memory_plan.h"

#include <algorithm>
#include <map>

#include "train/parameter_part.h"

namespace coterie {
namespace {

int64_t bytes(int64_t elements, DType dtype) { return elements * static_cast<int64_t>(dtype_size(dtype)); }

// The gradients that a ZeroOptimizer holds in the course of a step.
class GradientBytes {
 public:
  GradientBytes(const std::vector<SizedParameter>& parameters, const std::vector<ZeroBucket>& buckets, int64_t stage,
                int64_t passes)
      : parameters_(parameters), layout_(buckets), stage_(stage), passes_(passes), buckets_(buckets.size()) {
    for (size_t b = 0; b < buckets.size(); ++b) {
      for (const ZeroSlot& slot : buckets[b].slots) bucket_of_[slot.parameter] = b;
    }
  }

  int64_t peak() {
    for (int64_t pass = 0; pass < std::min<int64_t>(passes_, 3); ++pass) {  // all later ones are like the third
      sums_ = stage_ == 2 || pass + 1 == passes_;
      for (size_t i = parameters_.size(); i-- > 0;) {
        if (parameters_[i].trained) take(i);
      }
      end_pass();
    }
    return peak_;
  }

 private:
  struct Held {
    int64_t gradients = 0;  // of this pass, or in the parameter
    int64_t sum = 0;
    size_t num_filled = 0;
  };

  void set(int64_t& place, int64_t value) {
    held_ += value - place;
    place = value;
  }
  void see(int64_t beside = 0) { peak_ = std::max(peak_, held_ + beside); }

  void take(size_t parameter) {
    const size_t b = bucket_of_.at(parameter);
    const ZeroBucket& layout = layout_[b];
    const int64_t gradient = bytes(parameters_[parameter].size, layout.dtype);
    if (!layout.shared) return set(buckets_[b].gradients, gradient);
    set(buckets_[b].gradients, bytes(layout.size, gradient_dtype(layout, stage_, passes_)));
    see(gradient);
    ++buckets_[b].num_filled;
    if (sums_) begin_ready_sums();
  }

  void begin_ready_sums() {
    for (; next_sum_ < buckets_.size() && layout_[next_sum_].shared; ++next_sum_) {
      if (buckets_[next_sum_].num_filled < layout_[next_sum_].slots.size()) return;
      if (next_sum_ >= kMaxSumsUnderWay) finish_sum(next_sum_ - kMaxSumsUnderWay);
    }
  }

  void finish_sum(size_t b) {
    Held& bucket = buckets_[b];
    if (bucket.gradients == 0) return;
    if (stage_ < 2) {
      bucket.sum = bucket.gradients;
      bucket.gradients = 0;
      return;
    }
    set(bucket.sum, bytes(layout_[b].share, bucket.sum == 0 ? layout_[b].dtype : DType::kF32));
    see();
    set(bucket.gradients, 0);
  }

  void end_pass() {
    see();
    for (size_t b = 0; b < buckets_.size(); ++b) {
      Held& bucket = buckets_[b];
      bucket.num_filled = 0;
      if (layout_[b].shared) {
        if (sums_) finish_sum(b);
      } else if (bucket.gradients > 0) {
        set(bucket.sum, bytes(layout_[b].size, bucket.sum == 0 ? layout_[b].dtype : DType::kF32));
        set(bucket.gradients, 0);
      }
    }
    next_sum_ = 0;
  }

  const std::vector<SizedParameter>& parameters_;
  const std::vector<ZeroBucket>& layout_;
  const int64_t stage_, passes_;
  std::map<size_t, size_t> bucket_of_;
  std::vector<Held> buckets_;
  bool sums_ = false;  // in this pass
  size_t next_sum_ = 0;
  int64_t held_ = 0, peak_ = 0;
};

}  // namespace

std::vector<SizedParameter> parameters_of_rank(const MemoryCase& layout, int64_t rank) {
  const std::vector<int64_t> degrees =
      expert_parallel_degrees(layout.parallel.experts, layout.config, layout.num_ranks);
  std::map<int64_t, int64_t> degree_of;  // by layer
  for (int64_t i = 0; i < layout.config.num_layers(); ++i) {
    const bool is_moe = layout.config.layers[static_cast<size_t>(i)].is_moe();
    if (is_moe) degree_of.emplace(i, degrees[degree_of.size()]);
  }
  std::vector<SizedParameter> parameters;
  for (const TensorSpec& spec : logical_tensors(layout.config)) {
    ReplicaGroup replicas{.id = 0, .size = layout.num_ranks, .rank = rank};
    ExpertRanks experts;
    const auto degree = degree_of.find(layer_of_experts(spec.name));
    if (degree != degree_of.end()) {
      const int64_t neighbours = degree->second;
      replicas = {.id = neighbours, .size = layout.num_ranks / neighbours, .rank = rank / neighbours};
      experts = expert_part(spec.shape[0], neighbours, rank % neighbours);
    }
    const ParameterPart part =
        part_of(spec, layout.config, layout.dtype, degree == degree_of.end() ? nullptr : &experts);
    parameters.push_back({TensorSpec{"", part.shape}.num_elements(), part.dtype, part.trained, replicas});
  }
  return parameters;
}

TrainingBytes planned_bytes(const std::vector<SizedParameter>& parameters, const ParallelSettings& parallel,
                            int64_t passes) {
  const std::vector<ZeroBucket> buckets = zero_buckets(parameters, parallel.reduce_bucket_size);
  TrainingBytes planned;
  for (const ZeroBucket& bucket : buckets) {
    const int64_t states = bytes(bucket.states(parallel.zero_stage).size, DType::kF32);
    planned.weights += bytes(bucket.size, bucket.dtype);
    planned.masters += bucket.dtype == DType::kF32 ? 0 : states;
    const DType moments = parallel.states.moments_dtype == "bf16" ? DType::kBF16 : DType::kF32;
    planned.moments += 2 * bytes(bucket.states(parallel.zero_stage).size, moments);
  }
  planned.gradients = GradientBytes(parameters, buckets, parallel.zero_stage, passes).peak();
  return planned;
}

std::vector<TrainingBytes> plan_memory(const MemoryCase& layout) {
  std::vector<TrainingBytes> ranks;
  for (int64_t rank = 0; rank < layout.num_ranks; ++rank) {
    ranks.push_back(planned_bytes(parameters_of_rank(layout, rank), layout.parallel, layout.passes));
  }
  return ranks;
}

}  // namespace coterie
