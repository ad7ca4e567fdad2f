// Adam and AdamW (Loshchilov and Hutter 2019) over parameters that one or several ranks hold, with what ranks hold
// alike spread over them (ZeRO: Rajbhandari et al. 2020, section 5):
//
//   stage   gradients            moments and masters   messages per step, of n parameters
//   0       summed on all        on all                2n
//   1       summed on all        own partition         2n
//   2       own partition        own partition         n + n per backward pass
//
// Parameters that the same ranks hold lie in flat buckets of parallel.reduce_bucket_size elements, of which a rank owns
// an equal stretch each (zero_partition.h). Gradients are copied into their bucket when autograd has finished them, and
// a bucket that is complete begins its sum over the ranks, while the backward pass goes on: at stages 0 and 1 in the
// last pass of a step, at stage 2 in each. Parameters of one rank alone take no detour.
//
// Masters are fp32, and the parameter itself where that is fp32; bf16 parameters are rounded from them in every step.
// Gradients are summed over the passes of a step in fp32, over the ranks in rank order. Results are the same bits on
// all ranks and for any number of threads. Which messages run depends on the parameters and the settings alone: a
// parameter without a gradient takes part with zeros.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "comm/process_group.h"
#include "kernels/kernel_table.h"
#include "train/language_model.h"
#include "train/settings.h"
#include "train/state_view.h"
#include "train/training_bytes.h"
#include "train/zero_partition.h"

namespace coterie {

// What a step does to a parameter.
struct AdamWSettings {
  double learning_rate = 0;
  double beta1 = 0.9, beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  bool decoupled = true;  // the decay: AdamW's, else Adam's, which is part of the gradient
};

class ZeroOptimizer {
 public:
  // Moves replicated parameters into their buckets; the arguments outlive the optimizer. `world`: all ranks of the run,
  // over which the norm is taken; null: one. Every rank has the same parameters in the same order, with equal values
  // among replicas. A step has gradient_accumulation_steps backward passes.
  ZeroOptimizer(const std::vector<Parameter>& parameters, int64_t gradient_accumulation_steps,
                const ParallelSettings& parallel, ProcessGroup* world);
  ~ZeroOptimizer();  // takes its hooks off the parameters
  ZeroOptimizer(const ZeroOptimizer&) = delete;

  // After each backward pass: takes the gradients that are still in the parameters, and completes what the hooks have
  // begun.
  void accumulate_gradients();

  // Clips by the global norm, in which every logical parameter counts once (max_grad_norm 0: no clipping), updates,
  // clears the sums. `settings`: of every parameter. Returns the norm before clipping; when that is not finite and
  // `skips_overflow`, the sums are cleared and nothing else is done. `inspect` sees the norm, and gradient_views(),
  // before the update.
  using Inspect = std::function<void(double& norm)>;
  double step(const std::vector<AdamWSettings>& settings, double max_grad_norm, bool skips_overflow = false,
              const Inspect& inspect = {});

  // What this rank answers for between steps: per parameter its master under the parameter's own name, then
  // "optimizer.exp_avg.<name>" and "optimizer.exp_avg_sq.<name>"; from stage 1 on, of the own partition. Whoever writes
  // to the values calls publish_masters() afterwards, which is collective.
  std::vector<StateView> state_views() const;
  // Sums over passes and ranks of what state_views() has the masters of, under the parameter's name; of parameters that
  // are trained. Between the last pass of a step and its update.
  std::vector<StateView> gradient_views() const;
  void publish_masters();

  // Of the tensors that this rank holds now; of gradients also those that are still in the parameters.
  TrainingBytes held_bytes() const;
  // Is called whenever more gradients are held than before, so that who measures sees the most.
  void watch_gradients(std::function<void()> watch) { watch_ = std::move(watch); }

  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t steps) { num_steps_ = steps; }

 private:
  // Tensors are flat; [size] or, of the own partition alone, [share].
  struct Bucket : ZeroBucket {
    ProcessGroup* ranks = nullptr;  // null: one parameter of this rank alone
    std::vector<bool> filled;       // of each slot: has a gradient in `gradients`
    at::Tensor weights;             // [size], the memory of the parameters
    at::Tensor gradients;           // [size] of this pass (stage 2) or of the passes so far; undefined: none yet
    at::Tensor sum;                 // gradients of the step, over its passes and the ranks; undefined: zeros
    at::Tensor masters, exp_avg, exp_avg_sq;
    size_t num_filled = 0;  // in this pass
    Work work;
    std::string name;  // for messages of errors
  };
  // Elements [first, first + count) of a bucket, of one parameter.
  struct Chunk {
    size_t bucket, parameter;
    int64_t first, count;
  };

  void make_bucket(const ZeroBucket& layout);
  at::Tensor moved_weights(const ZeroBucket& layout) const;
  void make_states(Bucket& bucket) const;
  void make_chunks();
  void set_hooks();

  at::Tensor empty_gradients(const Bucket& bucket) const;
  void take_gradient(Bucket& bucket, size_t slot);
  void take_local_gradient(Bucket& bucket) const;
  void begin_ready_sums();
  void begin_sum(Bucket& bucket) const;
  void finish_sum(Bucket& bucket) const;
  bool sums_in_this_pass() const;

  double gradient_norm() const;
  void update(const Chunk& chunk, const AdamWFactors& factors) const;
  void gather_weights();
  // The stretch of a parameter that this rank answers for; its values are to be filled in, as stretch() of a tensor.
  struct Stretch {
    StateView view;
    int64_t first = 0, count = 0;  // in the bucket
  };
  Stretch own_stretch(const Bucket& bucket, const ZeroSlot& slot) const;
  static at::Tensor values_of(const Bucket& bucket, const Stretch& stretch, const at::Tensor& tensor);

  const std::vector<Parameter>& parameters_;
  const int64_t passes_per_step_;
  const int64_t stage_;
  const OptimizerStateSettings states_;
  ProcessGroup* const world_;
  std::vector<Bucket> buckets_;       // as zero_buckets() has them: shared ones in the order of their messages
  std::vector<Chunk> own_chunks_;     // of the own partition
  std::vector<Chunk> update_chunks_;  // of what this rank updates: at stage 0 everything
  size_t next_sum_ = 0;               // bucket that begins its sum next, in this pass
  int64_t passes_ = 0;                // of this step
  int64_t num_steps_ = 0;
  std::function<void()> watch_ = [] {};
};

}  // namespace coterie
