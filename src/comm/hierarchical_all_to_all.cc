// Legend: L ranks per node, N nodes; rank (n, l) is number n * L + l. A rank (n, l) hands what it has for (m, k), m
// another node, to its neighbour (n, k), who sends to (m, k) what all of node n has for it.
#include "comm/hierarchical_all_to_all.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "comm/collectives.h"
#include "comm/measure.h"
#include "comm/operation.h"
#include "coterie/error.h"

namespace coterie {
namespace {

using Counts = std::vector<int64_t>;

Counts copy_of(std::span<const int64_t> counts) { return {counts.begin(), counts.end()}; }

int64_t sum(const Counts& counts) {
  int64_t total = 0;
  for (const int64_t count : counts) total += count;
  return total;
}

class HierarchicalExchange final : public Operation {
 public:
  HierarchicalExchange(const Group& group, std::string_view label, const AllToAllV& exchange, int ranks_per_node)
      : Operation(group, "hierarchical all_to_all_v", label),
        L_(ranks_per_node),
        N_(size() / ranks_per_node),
        node_(rank() / ranks_per_node),
        local_(rank() % ranks_per_node),
        input_(exchange.input),
        output_(exchange.output),
        send_bytes_(copy_of(exchange.send_bytes)),
        send_offsets_(copy_of(exchange.send_offsets)),
        receive_bytes_(copy_of(exchange.receive_bytes)),
        receive_offsets_(copy_of(exchange.receive_offsets)) {}

 private:
  bool run_stage(int stage) override {
    if (stage == 0) exchange_inside_and_count();
    if (stage == 1) hand_over();
    if (stage == 2) exchange_between();
    if (stage == 3) unpack();
    return stage < 3;
  }

  // Stage 0: blocks for the own node go where they belong; neighbours learn what they will have to pass on.
  void exchange_inside_and_count() {
    const size_t own = at(rank());
    append(at_byte(output_, receive_offsets_[own]), at_byte(input_, send_offsets_[own]), send_bytes_[own]);
    transit_LN_.assign(static_cast<size_t>(L_), Counts(static_cast<size_t>(N_)));
    own_transit_LN_ = transit_LN_;
    for (int k = 0; k < L_; ++k) {
      for (int m = 0; m < N_; ++m) own_transit_LN_[at(k)][at(m)] = m == node_ ? 0 : send_bytes_[at(m * L_ + k)];
    }
    transit_LN_[at(local_)] = own_transit_LN_[at(local_)];
    const int64_t count_bytes = N_ * static_cast<int64_t>(sizeof(int64_t));
    for_each_neighbour([&](int k, int peer) {
      receive(peer, transit_LN_[at(k)].data(), count_bytes);
      receive(peer, at_byte(output_, receive_offsets_[at(peer)]), receive_bytes_[at(peer)]);
    });
    for_each_neighbour([&](int k, int peer) {
      send(peer, own_transit_LN_[at(k)].data(), count_bytes);
      send(peer, at_byte(input_, send_offsets_[at(peer)]), send_bytes_[at(peer)]);
    });
  }

  // Stage 1: to each neighbour, in one message, what it passes on for us; by node.
  void hand_over() {
    handed_L_.assign(static_cast<size_t>(L_), nullptr);
    for_each_neighbour([&](int k, int peer) {
      const int64_t bytes = sum(transit_LN_[at(k)]);
      handed_L_[at(k)] = scratch(bytes);
      receive(peer, handed_L_[at(k)], bytes);
    });
    for_each_neighbour([&](int k, int peer) {
      const int64_t bytes = sum(own_transit_LN_[at(k)]);
      std::byte *packed = scratch(bytes), *end = packed;
      for (int m = 0; m < N_; ++m) end = append(end, input_block(m, k), own_transit_LN_[at(k)][at(m)]);
      send(peer, packed, bytes);
    });
  }

  // Stage 2: to our like in each other node what the whole of this node has for it; by the rank it is from.
  void exchange_between() {
    arrived_N_.assign(static_cast<size_t>(N_), nullptr);
    for_each_node([&](int m) {
      const int64_t bytes = bytes_from_node(m);
      const bool in_place = lie_together(m);
      if (!in_place) arrived_N_[at(m)] = scratch(bytes);
      receive(m * L_ + local_, in_place ? at_byte(output_, receive_offsets_[at(m * L_)]) : arrived_N_[at(m)], bytes);
    });
    Counts done_L(static_cast<size_t>(L_));  // of what each neighbour has handed over, which lies in the order of nodes
    std::vector<std::byte*> packed_N(static_cast<size_t>(N_));
    Counts bytes_N(static_cast<size_t>(N_));
    for (int m = 0; m < N_; ++m) {
      if (m == node_) continue;
      for (int l = 0; l < L_; ++l) bytes_N[at(m)] += transit_LN_[at(l)][at(m)];
      std::byte* end = packed_N[at(m)] = scratch(bytes_N[at(m)]);
      for (int l = 0; l < L_; ++l) {
        const int64_t bytes = transit_LN_[at(l)][at(m)];
        end = append(end, l == local_ ? input_block(m, l) : handed_L_[at(l)] + done_L[at(l)], bytes);
        done_L[at(l)] += bytes;
      }
    }
    for_each_node([&](int m) { send(m * L_ + local_, packed_N[at(m)], bytes_N[at(m)]); });
  }

  void unpack() {
    for_each_node([&](int m) {
      if (lie_together(m)) return;
      const std::byte* from = arrived_N_[at(m)];
      for (int l = 0; l < L_; ++l) {
        const size_t source = at(m * L_ + l);
        append(at_byte(output_, receive_offsets_[source]), from, receive_bytes_[source]);
        from += receive_bytes_[source];
      }
    });
  }

  static size_t at(int index) { return static_cast<size_t>(index); }

  static std::byte* append(std::byte* to, const std::byte* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
    return to + bytes;
  }

  const std::byte* input_block(int node, int local) const {
    return at_byte(input_, send_offsets_[at(node * L_ + local)]);
  }

  int64_t bytes_from_node(int node) const {
    int64_t bytes = 0;
    for (int l = 0; l < L_; ++l) bytes += receive_bytes_[at(node * L_ + l)];
    return bytes;
  }

  // Whether the blocks of a node's ranks follow each other in the output, so that one message fills them all.
  bool lie_together(int node) const {
    for (int r = node * L_; r + 1 < (node + 1) * L_; ++r) {
      if (receive_offsets_[at(r)] + receive_bytes_[at(r)] != receive_offsets_[at(r + 1)]) return false;
    }
    return true;
  }

  template <typename Visit>
  void for_each_neighbour(Visit&& visit) {
    for (int step = 1; step < L_; ++step) {
      const int k = (local_ + step) % L_;
      visit(k, node_ * L_ + k);
    }
  }

  template <typename Visit>
  void for_each_node(Visit&& visit) {
    for (int step = 1; step < N_; ++step) visit((node_ + step) % N_);
  }

  int L_, N_, node_, local_;
  const void* input_;
  void* output_;
  Counts send_bytes_, send_offsets_, receive_bytes_, receive_offsets_;
  std::vector<Counts> own_transit_LN_;  // bytes that we hand to neighbour l for node n
  std::vector<Counts> transit_LN_;      // bytes that neighbour l hands to us for node n
  std::vector<std::byte*> handed_L_;
  std::vector<std::byte*> arrived_N_;
};

void check_topology(const ProcessGroup& group, int ranks_per_node) {
  if (ranks_per_node >= 1 && group.size() % ranks_per_node == 0) return;
  throw InvalidArgument("comm.ranks_per_node: does not divide the " + std::to_string(group.size()) +
                        " ranks of group " + group.name() + " (" + std::to_string(ranks_per_node) + ")");
}

// The best line through (bytes, seconds), each point weighing by its relative error.
Link fit(std::span<const int64_t> bytes, std::span<const double> seconds) {
  double w = 0, wx = 0, wxx = 0, wy = 0, wxy = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const double x = static_cast<double>(bytes[i]), y = seconds[i], weight = 1 / (y * y);
    w += weight, wx += weight * x, wxx += weight * x * x, wy += weight * y, wxy += weight * x * y;
  }
  const double slope = std::max(0.0, (w * wxy - wx * wy) / (w * wxx - wx * wx));
  return {.latency_s = std::max(0.0, (wy - slope * wx) / w), .s_per_byte = slope};
}

// Between this rank and `partner`, both ways at once; a rank without one (-1) takes part in the starts alone.
Link measure_link(ProcessGroup& group, int partner) {
  constexpr std::array<int64_t, 4> kBytes = {64, 4096, 65536, 524288};
  std::array<double, kBytes.size()> seconds{};
  std::vector<std::byte> input(kBytes.back()), output(kBytes.back());
  for (size_t i = 0; i < kBytes.size(); ++i) {
    Counts counts(static_cast<size_t>(group.size())), offsets(counts.size());
    if (partner >= 0) counts[static_cast<size_t>(partner)] = kBytes[i];
    const AllToAllV exchange{input.data(), counts, offsets, output.data(), counts, offsets};
    group.barrier("measure links");
    seconds[i] =
        median_seconds(i + 1 < kBytes.size() ? 50 : 10, [&] { group.all_to_all_v(exchange, "measure links"); });
  }
  return partner >= 0 ? fit(kBytes, seconds) : Link{};
}

}  // namespace

LinkModel measure_links(ProcessGroup& group, int ranks_per_node) {
  check_topology(group, ranks_per_node);
  const int L = ranks_per_node, N = group.size() / L, node = group.rank() / L, local = group.rank() % L;
  const int neighbour = (local ^ 1) < L ? node * L + (local ^ 1) : -1;
  const int across = (node ^ 1) < N ? (node ^ 1) * L + local : -1;
  const Link inside = measure_link(group, neighbour), between = measure_link(group, across);
  const auto scaled = [](double seconds) { return static_cast<int64_t>(std::llround(seconds * 1e15)); };
  std::array<int64_t, 4> slowest = {scaled(inside.latency_s), scaled(inside.s_per_byte), scaled(between.latency_s),
                                    scaled(between.s_per_byte)};
  group.all_reduce(slowest.data(), 4, DType::kI64, ReduceOp::kMax, "agree on links");
  const auto link = [&](size_t i) {
    return Link{static_cast<double>(slowest[i]) * 1e-15, static_cast<double>(slowest[i + 1]) * 1e-15};
  };
  return {.inside = link(L > 1 ? 0 : 2), .between = link(N > 1 ? 2 : 0)};
}

double flat_seconds(const LinkModel& model, int ranks, int ranks_per_node, double bytes) {
  return (ranks_per_node - 1) * model.inside.seconds(bytes) + (ranks - ranks_per_node) * model.between.seconds(bytes);
}

double hierarchical_seconds(const LinkModel& model, int ranks, int ranks_per_node, double bytes) {
  const int L = ranks_per_node, N = ranks / L;
  const double counts = model.inside.seconds(8.0 * N), own = model.inside.seconds(bytes);
  const double handed = model.inside.seconds((N - 1) * bytes);
  return (L - 1) * (counts + own + handed) + (N - 1) * model.between.seconds(L * bytes);
}

AllToAllAlgorithm all_to_all_algorithm_from_name(std::string_view name) {
  if (name == "auto") return AllToAllAlgorithm::kAuto;
  if (name == "flat") return AllToAllAlgorithm::kFlat;
  if (name == "hierarchical") return AllToAllAlgorithm::kHierarchical;
  throw InvalidArgument("comm.all_to_all: must be auto, flat or hierarchical (\"" + std::string(name) + "\")");
}

AllToAll::AllToAll(ProcessGroup& group, int ranks_per_node, AllToAllAlgorithm algorithm, const LinkModel& model,
                   int64_t typical_bytes)
    : group_(group), ranks_per_node_(ranks_per_node) {
  check_topology(group, ranks_per_node);
  const bool two_levels = ranks_per_node > 1 && ranks_per_node < group.size();
  const auto bytes = static_cast<double>(typical_bytes);
  const bool faster = hierarchical_seconds(model, group.size(), ranks_per_node, bytes) <
                      flat_seconds(model, group.size(), ranks_per_node, bytes);
  hierarchical_ = two_levels &&
                  (algorithm == AllToAllAlgorithm::kHierarchical || (algorithm == AllToAllAlgorithm::kAuto && faster));
}

Work AllToAll::start(const AllToAllV& exchange, std::string_view label) {
  if (!hierarchical_) return group_.start_all_to_all_v(exchange, label);
  check_exchange(exchange, group_.rank(), group_.size());
  return begin_operation<HierarchicalExchange>(group_.state_, label, exchange, ranks_per_node_);
}

}  // namespace coterie
