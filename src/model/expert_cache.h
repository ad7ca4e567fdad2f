// Experts of a model whose packed weights are mapped, not read: those that the router chooses often are copied into
// memory of our own (huge pages, which the system doesn't take back), the others are read from the file when they are
// needed. Results don't depend on what is held. One thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/memory.h"
#include "model/weights.h"

namespace coterie {

class ExpertCache {
 public:
  struct Stats {
    int64_t capacity = 0;  // experts that fit
    int64_t held = 0;
    int64_t uses = 0, hits = 0;  // of an expert by a forward pass, and those that found it held
  };

  // Holds at most `bytes`, none of which are touched before they are needed. weights must outlive the cache, and nobody
  // else may change their experts.
  ExpertCache(ModelWeights& weights, size_t bytes);

  // The tokens of a layer are about to go to these experts: begins to read those that are not held, and the likely ones
  // of the next layer with experts; takes in or exchanges a few by how often they were chosen lately.
  void use(int64_t layer, std::span<const int64_t> offset_E1);

  Stats stats() const;

 private:
  struct Expert {
    PackedMatrix* up = nullptr;  // in the weights
    PackedMatrix* down = nullptr;
    const void* up_file = nullptr;  // in the mapped file
    const void* down_file = nullptr;
    double heat = 0;    // uses, recent ones more than old ones
    int64_t slot = -1;  // -1: not held
  };

  void read_ahead(const Expert& expert) const;
  void read_ahead_likely(int64_t layer) const;
  void warm_up(Expert& expert);
  void admit(Expert& candidate);
  void hold(Expert& expert, int64_t slot);
  void release(Expert& expert);

  std::vector<std::vector<Expert>> layers_;  // [layers][experts], empty for layers without
  size_t slot_bytes_ = 0;
  AlignedBuffer memory_;
  std::vector<Expert*> slots_;  // null: free
  double heat_of_use_ = 1;      // grows, which lets older uses fade
  int64_t uses_ = 0, hits_ = 0;
};

}  // namespace coterie
