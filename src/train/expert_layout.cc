#include "train/expert_layout.h"

#include <numeric>

#include "coterie/error.h"

namespace coterie {
namespace {

// Rows of an expert in a pass from which on half of them travel while the experts work on the other half. A second part
// packs all weights again and adds up their gradients, about 50 bytes of memory traffic for each fp32 weight, whatever
// the rows; each row costs 6 operations of it, forward and backward. At 8 GB/s and 60 GFLOP/s a core that is 6 ns to
// 200 at 2048 rows; in bf16, half the bytes at some five times the rate, 3 to 40. train_expert_parallel_bench on two
// ranks of one machine, where nothing is gained: two parts take up to 3.8 times as long with 4 rows, 1.6 with 256, 1.1
// with 1024, and as long as one with 2048, within 5 %.
constexpr int64_t kRowsOfTwoParts = 2048;

int64_t slices_of(int64_t degree, int64_t num_experts) { return degree > num_experts ? degree / num_experts : 1; }

int64_t checked_degree(int64_t asked, const ModelConfig& config, int64_t index, int64_t num_ranks) {
  const LayerConfig& layer = config.layers[static_cast<size_t>(index)];
  const int64_t num_experts = layer.router.num_experts;
  if (asked == ExpertParallelSettings::kAuto) return std::gcd(num_experts, num_ranks);
  const std::string field = "parallel.expert_parallel: " + std::to_string(asked);
  if (asked < 1) throw InvalidArgument(field + " is below 1");
  if (num_ranks % asked != 0) {
    throw InvalidArgument(field + " does not divide the " + std::to_string(num_ranks) + " ranks");
  }
  if (num_experts % asked != 0 && asked % num_experts != 0) {
    throw InvalidArgument(field + " is neither a divisor nor a multiple of the " + std::to_string(num_experts) +
                          " experts of layer " + std::to_string(index));
  }
  const int64_t slices = slices_of(asked, num_experts);
  const auto check_cut = [&](const char* what, int64_t size) {
    if (size % slices == 0) return;
    throw InvalidArgument(field + " cuts each expert of layer " + std::to_string(index) + " into " +
                          std::to_string(slices) + " slices, which do not divide its " + what + " (" +
                          std::to_string(size) + ")");
  };
  check_cut("expert_intermediate_size", layer.expert_intermediate_size);
  if (config.mlp_bias) check_cut("hidden_size, the length of a bias", config.hidden_size);
  return asked;
}

// Of a group of neighbours.
int ranks_per_node(const ExpertParallelSettings& settings, const ProcessGroup& group) {
  const auto asked = static_cast<int>(settings.ranks_per_node);
  return asked == 0 || asked > group.size() ? group.size() : asked;
}

}  // namespace

std::vector<int64_t> expert_parallel_degrees(const ExpertParallelSettings& settings, const ModelConfig& config,
                                             int64_t num_ranks) {
  const std::vector<int64_t>& asked = settings.expert_parallel;
  std::vector<int64_t> degrees, moe_layers;
  for (int64_t i = 0; i < config.num_layers(); ++i) {
    if (config.layers[static_cast<size_t>(i)].is_moe()) moe_layers.push_back(i);
  }
  if (asked.size() != 1 && asked.size() != moe_layers.size()) {
    throw InvalidArgument("parallel.expert_parallel: has " + std::to_string(asked.size()) + " entries, the model " +
                          std::to_string(moe_layers.size()) + " MoE layers");
  }
  for (size_t i = 0; i < moe_layers.size(); ++i) {
    degrees.push_back(checked_degree(asked[asked.size() == 1 ? 0 : i], config, moe_layers[i], num_ranks));
  }
  return degrees;
}

ExpertRanks expert_part(int64_t num_experts, int64_t degree, int64_t place) {
  const int64_t slices = slices_of(degree, num_experts), own = num_experts * slices / degree;
  const int64_t first_slice = place * own;  // where the first slices of all experts come before the second ones
  return {.first_expert = first_slice % num_experts,
          .num_experts = own,
          .slices = slices,
          .slice = first_slice / num_experts};
}

ExpertLayout::ExpertLayout(ProcessGroup& world, const ExpertParallelSettings& settings, const ModelConfig& config,
                           int64_t element_bytes)
    : world_(world.size() > 1 ? &world : nullptr) {
  const std::vector<int64_t> degrees = expert_parallel_degrees(settings, config, world.size());
  if (!world_) return;
  size_t next = 0;
  for (int64_t i = 0; i < config.num_layers(); ++i) {
    const LayerConfig& layer = config.layers[static_cast<size_t>(i)];
    if (!layer.is_moe()) continue;
    layers_.emplace(i, ranks_of(i, layer, degrees[next++], settings, config.hidden_size * element_bytes));
  }
}

const ExpertRanks* ExpertLayout::layer(int64_t index) const {
  const auto found = layers_.find(index);
  return found == layers_.end() ? nullptr : &found->second;
}

const ExpertLayout::Groups& ExpertLayout::groups_of(int64_t degree, const ExpertParallelSettings& settings) {
  const auto [found, is_new] = groups_.try_emplace(degree);
  Groups& groups = found->second;
  if (!is_new) return groups;
  const int rank = world_->rank(), neighbours = static_cast<int>(degree);
  const std::string name = std::to_string(degree);
  groups.together = world_->split(rank / neighbours, rank, "ep" + name);
  groups.replicas = world_->split(rank % neighbours, rank, "replicas of ep" + name);
  const int per_node = ranks_per_node(settings, *groups.together);
  const bool measures = settings.all_to_all == AllToAllAlgorithm::kAuto && per_node > 1 && per_node < neighbours;
  if (measures) groups.links = measure_links(*groups.together, per_node);
  return groups;
}

ExpertRanks ExpertLayout::ranks_of(int64_t index, const LayerConfig& layer, int64_t degree,
                                   const ExpertParallelSettings& settings, int64_t row_bytes) {
  const Groups& groups = groups_of(degree, settings);
  ExpertRanks ranks = expert_part(layer.router.num_experts, degree, groups.together->rank());
  ranks.replicas = groups.replicas->size() > 1 ? groups.replicas.get() : nullptr;
  ranks.label = "layer " + std::to_string(index);
  if (degree == 1) return ranks;
  const int64_t choices = settings.tokens_per_rank * layer.router.top_k;  // of a rank, in a pass
  ranks.parts = choices * degree / layer.router.num_experts >= kRowsOfTwoParts ? 2 : 1;
  ranks.group = groups.together.get();
  ranks.exchange = std::make_unique<AllToAll>(*ranks.group, ranks_per_node(settings, *ranks.group), settings.all_to_all,
                                              groups.links, choices * ranks.slices / degree / ranks.parts * row_bytes);
  return ranks;
}

}  // namespace coterie
