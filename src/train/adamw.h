// AdamW (Loshchilov and Hutter 2019) over the parameters of a LanguageModel: fp32 master weights and
// moments; bf16 parameters are rounded from their masters in every step, and their gradients are summed in fp32 over
// the micro-batches of a step. A step reads the gradients once for their norm and once, with all else, to update.
// Results don't depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "kernels/kernel_table.h"
#include "train/language_model.h"
#include "train/settings.h"
#include "train/state_view.h"

namespace coterie {

class AdamW {
 public:
  AdamW(const std::vector<Parameter>& parameters, const TrainSettings& settings);

  // Moves the gradients of one micro-batch from the parameters into the step's sum.
  void accumulate_gradients();

  // Clips by the global norm, updates, clears the sum. Returns the norm before clipping.
  double step(double learning_rate);

  // All that this rank holds between steps: per parameter its master under the parameter's own name, then
  // "optimizer.exp_avg.<name>" and "optimizer.exp_avg_sq.<name>". Whoever writes to the values calls publish_masters()
  // afterwards.
  std::vector<StateView> state_views() const;
  void publish_masters();

  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t steps) { num_steps_ = steps; }

 private:
  // Elements [first, first + count) of a parameter.
  struct Chunk {
    size_t parameter;
    int64_t first, count;
  };

  bool decays(size_t parameter) const;  // matrices alone
  double gradient_norm(const std::vector<Chunk>& chunks) const;
  void update(const Chunk& chunk, const AdamWFactors& factors) const;

  const std::vector<Parameter>& parameters_;
  const TrainSettings& settings_;
  std::vector<at::Tensor> masters_;    // the parameter itself when it is fp32
  std::vector<at::Tensor> gradients_;  // sums of this step: as the first micro-batch left them, or fp32; undefined: 0
  std::vector<at::Tensor> exp_avg_;
  std::vector<at::Tensor> exp_avg_sq_;
  int64_t num_steps_ = 0;
};

}  // namespace coterie
