// The trained model: parameters by their logical names (model/tensors.h) and the forward pass over
// our kernels, for every ModelConfig. Legend: B sequences, S their length, T = B * S tokens, D hidden.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "io/element_order.h"
#include "model/config.h"
#include "model/tensors.h"
#include "moe/load.h"
#include "moe/router.h"
#include "train/expert_layout.h"
#include "train/ops.h"
#include "train/router_losses.h"

namespace coterie {

class TensorSource;

// "fp32" or "bf16"; InvalidArgument for another name.
at::ScalarType parameter_type(const std::string& dtype);

struct Parameter {
  std::string name;
  // A leaf; matrices in the model's dtype, everything else fp32. Of choice biases without a gradient.
  at::Tensor tensor;
  std::vector<int64_t> logical_shape;
  // The tensor is elements [first_element, first_element + its own) of the logical one, counted in this order.
  ElementOrder order = {};
  int64_t first_element = 0;
  // The ranks that hold the same elements, over which gradients are summed; null: this rank alone.
  ProcessGroup* replicas = nullptr;
};

// A logical tensor's elements in an order, flat.
at::Tensor in_order(const at::Tensor& logical, const ElementOrder& order);
// The part of a logical tensor's values that the parameter is, in its shape.
at::Tensor own_part(const Parameter& parameter, const at::Tensor& logical);

// The load of each MoE layer's experts that the balance loss is about.
using BalanceCounts = std::vector<std::vector<int64_t>>;

// What a forward pass needs to know beside the tokens. Random choices are a pure function of
// (seed, step, layer, global token index).
struct ForwardOptions {
  bool training = false;  // see RouteOptions
  uint64_t seed = 0;
  uint64_t step = 0;
  int64_t first_token = 0;  // global index of the batch's first token within the step
  BalanceChoices balance_choices = BalanceChoices::kAll;
  BalanceCounts* balance_counts = nullptr;  // of earlier passes, added to by this one; null: of this one alone
};

struct ForwardResult {
  at::Tensor hidden_TD;                            // after the final norm
  at::Tensor balance_loss;                         // sum over the MoE layers whose tokens choose; undefined without any
  at::Tensor z_loss;                               // sum over MoE layers; undefined without any
  std::vector<std::shared_ptr<Routing>> routings;  // one per MoE layer
  std::vector<at::Tensor> router_logits_TE;        // of these
};

class LanguageModel {
 public:
  // Initialised as GPT-2 and Megatron do: normal(0, initializer_range), matrices that write to the
  // residual stream scaled by 1/sqrt(2 * layers), biases 0, norms 1. A tensor's values are a pure
  // function of (seed, its place in the list), whatever the layout.
  //
  // With a world of several ranks, each of them makes the model, calls forward() and runs backward passes together
  // with all others, on its own part of the batch, and holds its part of the experts (ExpertLayout). Means over
  // tokens are over the rank's own: a loss divided by the number of ranks (of equally many tokens each) gives
  // gradients whose sums over Parameter::replicas are those of the whole batch. `world` outlives the model.
  LanguageModel(const ModelConfig& config, at::ScalarType dtype, uint64_t seed, ProcessGroup* world = nullptr,
                const ExpertParallelSettings& parallel = {});
  LanguageModel(const LanguageModel&) = delete;  // its groups are not copied
  LanguageModel(LanguageModel&&) = default;

  const ModelConfig& config() const { return config_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }

  // Reads every parameter from a file in logical names. InvalidArgument names what is missing,
  // surplus or of another shape.
  void load(const TensorSource& source);

  ForwardResult forward(const at::Tensor& tokens_BS, const ForwardOptions& options) const;
  at::Tensor head() const;  // the output matrix [V, D]

  // Moves every router's choice bias against the load, given per MoE layer (see update_choice_bias).
  void update_choice_biases(const std::vector<LoadCounter>& loads, double rate) const;

 private:
  // One layer's tensors; undefined where the configuration has none.
  struct Norm {
    at::Tensor weight, bias;
  };
  struct Projection {
    at::Tensor weight, bias;
  };
  struct Layer {
    Norm input_norm, post_attention_norm;
    Projection q, k, v, o;
    at::Tensor q_norm, k_norm;
    ExpertTensors mlp, experts;
    at::Tensor router, choice_bias;
    Projection mix;
  };

  Parameter make_parameter(const TensorSpec& spec, at::ScalarType dtype, uint64_t seed) const;
  at::Tensor get(const std::string& name) const;  // undefined when absent
  Norm norm_named(const std::string& prefix) const;
  Projection projection_named(const std::string& prefix) const;
  ExpertTensors experts_named(const std::string& prefix) const;
  Layer layer_named(int64_t index) const;

  at::Tensor embed(const at::Tensor& tokens_BS) const;
  at::Tensor attention(const Layer& layer, const at::Tensor& x, int64_t sequence_length) const;
  at::Tensor feed_forward(const LayerConfig& layer_config, const Layer& layer, const at::Tensor& x, int64_t index,
                          const ForwardOptions& options, ForwardResult& result) const;
  at::Tensor routed(const LayerConfig& layer_config, const Layer& layer, const at::Tensor& x, int64_t index,
                    const ForwardOptions& options, ForwardResult& result) const;
  void add_router_losses(const ForwardOptions& options, ForwardResult& result) const;
  void count_choices_of_all_ranks(const ForwardOptions& options, const ForwardResult& result,
                                  BalanceCounts& counts) const;

  ModelConfig config_;
  ExpertLayout layout_;
  std::vector<Parameter> parameters_;
  std::map<std::string, size_t> index_;
  std::vector<Layer> layers_;
};

}  // namespace coterie
