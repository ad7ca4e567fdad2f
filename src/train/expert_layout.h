// Which ranks hold which experts (DeepSpeed-MoE, section 5.2). Each MoE layer has its own degree of expert
// parallelism: so many neighbouring ranks hold all of its experts together, num_experts / degree each, and
// degree x (ranks that hold the same experts) = ranks. A degree of slices x num_experts cuts each expert into so many
// slices, of which a rank holds one: a slice is an expert of fewer intermediate units that gets the same tokens, and
// what the slices return adds up. The j-th slices of all experts are neighbours, so that an expert with many tokens
// is spread over nodes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/hierarchical_all_to_all.h"
#include "comm/process_group.h"
#include "model/config.h"

namespace coterie {

struct ExpertParallelSettings {
  // Degrees: one for all MoE layers, or one for each of them, in order. kAuto: the largest that divides both
  // the layer's experts and the ranks; where one divides the other, min(num_experts, ranks). It cuts no expert, since
  // more ranks that hold the same experts cost less: their gradients travel once per step, activations in each pass.
  static constexpr int64_t kAuto = 0;
  std::vector<int64_t> expert_parallel = {kAuto};
  int64_t ranks_per_node = 0;  // 0: all ranks are one node
  AllToAllAlgorithm all_to_all = AllToAllAlgorithm::kAuto;
  int64_t tokens_per_rank = 0;  // that go through the model at once: all_to_all's kAuto and `parts` follow from it
};

// The degree of every MoE layer. InvalidArgument: "parallel.expert_parallel: 6 is neither a divisor nor a multiple of
// the 4 experts of layer 1".
std::vector<int64_t> expert_parallel_degrees(const ExpertParallelSettings& settings, const ModelConfig& config,
                                             int64_t num_ranks);

// This rank's part of one MoE layer.
struct ExpertRanks {
  int64_t first_expert = 0;
  int64_t num_experts = 0;             // of this rank
  int64_t slices = 1;                  // of each expert
  int64_t slice = 0;                   // that this rank holds of its expert
  int64_t parts = 1;                   // in which the tokens of a pass go through (expert_exchange.h)
  ProcessGroup* group = nullptr;       // the ranks that hold all experts together; null: this rank alone
  ProcessGroup* replicas = nullptr;    // the ranks that hold the same experts; null: this rank alone
  std::unique_ptr<AllToAll> exchange;  // within `group`
  std::string label;                   // for errors: "layer 3"
};

// The numbers of the part, without its groups, of the rank at this place among `degree` neighbours; the ranks at the
// same place in other groups of neighbours hold the same experts.
ExpertRanks expert_part(int64_t num_experts, int64_t degree, int64_t place);

// The groups of every degree that a model needs, and each MoE layer's part. Made by all ranks of the world alike.
class ExpertLayout {
 public:
  ExpertLayout() = default;  // one rank, which has no need of it
  // element_bytes: of what is exchanged. `world` outlives the layout.
  ExpertLayout(ProcessGroup& world, const ExpertParallelSettings& settings, const ModelConfig& config,
               int64_t element_bytes);

  ProcessGroup* world() const { return world_; }  // null: one rank
  // Of the MoE layer at this index among all layers; null for other layers, and on one rank.
  const ExpertRanks* layer(int64_t index) const;

 private:
  struct Groups {
    std::unique_ptr<ProcessGroup> together, replicas;
    LinkModel links;
  };
  const Groups& groups_of(int64_t degree, const ExpertParallelSettings& settings);
  ExpertRanks ranks_of(int64_t index, const LayerConfig& layer, int64_t degree, const ExpertParallelSettings& settings,
                       int64_t row_bytes);

  ProcessGroup* world_ = nullptr;
  std::map<int64_t, Groups> groups_;       // by degree
  std::map<int64_t, ExpertRanks> layers_;  // by layer
};

}  // namespace coterie
