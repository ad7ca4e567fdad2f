// Legend beside moe/router.h's: N ranks, C this rank's claims, grouped by expert.
#include "moe/shared_capacity.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "comm/process_group.h"
#include "moe/capacity.h"

namespace coterie {
namespace {

using Counts = std::vector<int64_t>;

// Bytes and offsets of blocks that lie one after the other.
struct Blocks {
  void append(int64_t block_bytes) {
    offsets.push_back(end);
    bytes.push_back(block_bytes);
    end += block_bytes;
  }
  Counts bytes, offsets;
  int64_t end = 0;
};

// The claims on an expert meet on one rank, its judge; those of neighbouring experts often on the same one.
struct Places {
  const RouterConfig& config;
  const RouteOptions& options;
  Routing& routing;
  ThreadPool& pool;
  bool experts_choose;

  ProcessGroup& world = *options.world;
  const int64_t N = world.size(), E = routing.num_experts, K = routing.top_k, T = routing.num_tokens;
  std::string label = "layer " + std::to_string(options.key.layer) + " ";
  Counts counts_NE1 = Counts(static_cast<size_t>(N * (E + 1)));  // claims of each rank on each expert, and its tokens
  Counts capacity_E = {};  // of experts that are over it; the others need no judge: -1

  int64_t judge_of(int64_t e) const { return e * N / E; }
  int64_t count(int64_t n, int64_t e) const { return counts_NE1[n * (E + 1) + e]; }

  void run() {
    gather_counts();
    const std::vector<Claim> claims_C = own_claims();
    const std::vector<Claim> judged = exchange(claims_C, /*to_judges=*/true, "claims");
    const std::vector<uint8_t> kept_C = exchange(judge(judged), /*to_judges=*/false, "places");
    apply(claims_C, kept_C);
  }

  void gather_counts() {
    Counts own_E1(static_cast<size_t>(E + 1));
    for (const int32_t e : routing.expert_ids_TK) ++own_E1[e];
    own_E1[E] = T;
    world.all_gather(own_E1.data(), counts_NE1.data(), (E + 1) * static_cast<int64_t>(sizeof(int64_t)),
                     label + "claims per expert");
    int64_t all_tokens = 0;
    for (int64_t n = 0; n < N; ++n) all_tokens += count(n, E);
    const int64_t capacity = config.capacity(all_tokens, options.training);
    for (int64_t e = 0; e < E; ++e) {
      int64_t claims = 0;
      for (int64_t n = 0; n < N; ++n) claims += count(n, e);
      capacity_E.push_back(claims > capacity ? capacity : -1);
    }
  }

  // Of the experts that need a judge.
  std::vector<Claim> own_claims() const {
    std::vector<int64_t> next_E(static_cast<size_t>(E));
    int64_t C = 0;
    for (int64_t e = 0; e < E; ++e) {
      next_E[e] = C;
      if (capacity_E[e] >= 0) C += count(world.rank(), e);
    }
    std::vector<Claim> claims_C(static_cast<size_t>(C));
    for (int64_t choice = 0; choice < T * K; ++choice) {
      const int32_t e = routing.expert_ids_TK[choice];
      if (capacity_E[e] >= 0) claims_C[next_E[e]++] = claim_of(config, options.key, routing, choice, experts_choose);
    }
    return claims_C;
  }

  int64_t claims_between(int64_t from, int64_t judge) const {
    int64_t claims = 0;
    for (int64_t e = 0; e < E; ++e) {
      if (judge_of(e) == judge && capacity_E[e] >= 0) claims += count(from, e);
    }
    return claims;
  }

  template <typename Item>
  std::vector<Item> exchange(const std::vector<Item>& items, bool to_judges, const char* what) const {
    const int64_t size = sizeof(Item), own = world.rank();
    Blocks claims, judged;
    for (int64_t n = 0; n < N; ++n) {
      claims.append(claims_between(own, n) * size);
      judged.append(claims_between(n, own) * size);
    }
    const Blocks &sent = to_judges ? claims : judged, &received = to_judges ? judged : claims;
    std::vector<Item> result(static_cast<size_t>(received.end / size));
    world.all_to_all_v({items.data(), sent.bytes, sent.offsets, result.data(), received.bytes, received.offsets},
                       label + what);
    return result;
  }

  // What arrives lies by rank, and in each by expert.
  std::vector<uint8_t> judge(const std::vector<Claim>& claims) const {
    std::vector<uint8_t> kept(claims.size());
    std::vector<std::vector<size_t>> places_E(static_cast<size_t>(E));  // of claims
    size_t next = 0;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t e = 0; e < E; ++e) {
        if (judge_of(e) != world.rank() || capacity_E[e] < 0) continue;
        for (int64_t i = 0; i < count(n, e); ++i) places_E[e].push_back(next++);
      }
    }
    pool.run(E, [&](int64_t e, int) {
      std::vector<size_t>& places = places_E[e];
      if (places.empty()) return;
      const auto end = places.begin() + capacity_E[e];
      std::nth_element(places.begin(), end, places.end(), [&](size_t a, size_t b) { return claims[a] < claims[b]; });
      std::for_each(places.begin(), end, [&](size_t place) { kept[place] = 1; });
    });
    return kept;
  }

  void apply(const std::vector<Claim>& claims_C, const std::vector<uint8_t>& kept_C) {
    std::fill(routing.kept_TK.begin(), routing.kept_TK.end(), 1);
    const int64_t first_choice = options.key.first_token * K;
    for (size_t c = 0; c < claims_C.size(); ++c) routing.kept_TK[claims_C[c].second - first_choice] = kept_C[c];
    std::fill(routing.tokens_per_expert_E.begin(), routing.tokens_per_expert_E.end(), 0);
    for (size_t choice = 0; choice < routing.kept_TK.size(); ++choice) {
      routing.tokens_per_expert_E[routing.expert_ids_TK[choice]] += routing.kept_TK[choice];
    }
  }
};

}  // namespace

void share_places(const RouterConfig& config, const RouteOptions& options, bool experts_choose, Routing& routing,
                  ThreadPool& pool) {
  Places{config, options, routing, pool, experts_choose}.run();
}

}  // namespace coterie
