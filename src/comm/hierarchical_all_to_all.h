// all_to_all_v in two steps (DeepSpeed-MoE, section 5.3): inside the node, then between the nodes, so that a rank of p
// in nodes of L sends (L - 1) + (p / L - 1) messages instead of p - 1, of twice the bytes in all. It wins where
// messages are small and latency between nodes is what costs.
//
// Ranks of one node are neighbours: node = rank / ranks_per_node. The result is all_to_all_v's to the byte.
#pragma once

#include <cstdint>
#include <string_view>

#include "comm/process_group.h"

namespace coterie {

// What a message costs: latency_s + bytes * s_per_byte.
struct Link {
  double latency_s = 0;
  double s_per_byte = 0;

  double seconds(double bytes) const { return latency_s + bytes * s_per_byte; }
};

struct LinkModel {
  Link inside;   // two ranks of one node
  Link between;  // ranks of two nodes
};

// Measures both links (about 20 ms; collective over the group) and agrees on the slowest rank's figures, the same on
// all ranks. A link that the group doesn't have costs what the other does.
LinkModel measure_links(ProcessGroup& group, int ranks_per_node);

// Modelled time of one exchange in which each rank has `bytes` for each other one.
double flat_seconds(const LinkModel& model, int ranks, int ranks_per_node, double bytes);
double hierarchical_seconds(const LinkModel& model, int ranks, int ranks_per_node, double bytes);

enum class AllToAllAlgorithm { kAuto, kFlat, kHierarchical };
AllToAllAlgorithm all_to_all_algorithm_from_name(std::string_view name);  // "auto", "flat", "hierarchical"

// The exchange of one MoE layer. The algorithm is fixed when it is made: which messages run never depends on data.
class AllToAll {
 public:
  // typical_bytes: what a rank has for another one in an average exchange, the same on all ranks; decides kAuto. With
  // one node, or nodes of one rank, it is always flat. InvalidArgument when ranks_per_node doesn't divide the group.
  AllToAll(ProcessGroup& group, int ranks_per_node, AllToAllAlgorithm algorithm, const LinkModel& model,
           int64_t typical_bytes);

  bool hierarchical() const { return hierarchical_; }
  Work start(const AllToAllV& exchange, std::string_view label);

 private:
  ProcessGroup& group_;
  int ranks_per_node_;
  bool hierarchical_ = false;
};

}  // namespace coterie
