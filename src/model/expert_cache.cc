#include "model/expert_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace coterie {
namespace {

// A use counts half after so many forward passes through a layer.
constexpr double kHalfLife = 1024;
constexpr double kMostHeat = 1e30;
// To exchange two experts of about the same heat all the time would copy for nothing.
constexpr double kWorthExchanging = 1.5;
// Copies in a call, so that no single token waits for many.
constexpr int kAdmissionsPerUse = 2;
// Experts of the next layer that are read ahead.
constexpr int64_t kLikelyExperts = 8;

void will_need(const void* data, size_t bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(data) / page * page;
  madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(data) + bytes - first, MADV_WILLNEED);  // a hint
}

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

ExpertCache::ExpertCache(ModelWeights& weights, size_t bytes) {
  size_t num_experts = 0;
  for (LayerWeights& layer : weights.layers) {
    std::vector<Expert>& experts = layers_.emplace_back();
    for (size_t e = 0; e < layer.experts.up_E.size(); ++e) {
      PackedMatrix &up = layer.experts.up_E[e], &down = layer.experts.down_E[e];
      experts.push_back({.up = &up, .down = &down, .up_file = up.data(), .down_file = down.data()});
      slot_bytes_ = std::max(slot_bytes_, padded(up.bytes()) + padded(down.bytes()));
    }
    num_experts += experts.size();
  }
  if (num_experts == 0) return;
  slots_.resize(std::min(bytes / slot_bytes_, num_experts));
  memory_ = AlignedBuffer(slots_.size() * slot_bytes_);
}

void ExpertCache::use(int64_t layer, std::span<const int64_t> offset_E1) {
  std::vector<Expert>& experts = layers_[layer];
  std::vector<Expert*> missing;
  heat_of_use_ *= std::exp2(1 / (kHalfLife * static_cast<double>(layers_.size())));
  for (size_t e = 0; e < experts.size(); ++e) {
    if (offset_E1[e] == offset_E1[e + 1]) continue;
    ++uses_;
    warm_up(experts[e]);
    if (experts[e].slot >= 0) {
      ++hits_;
    } else {
      read_ahead(experts[e]);
      missing.push_back(&experts[e]);
    }
  }
  std::ranges::sort(missing, [](const Expert* a, const Expert* b) { return a->heat > b->heat; });
  for (size_t i = 0; i < missing.size() && i < kAdmissionsPerUse; ++i) admit(*missing[i]);
  read_ahead_likely(layer + 1);
}

ExpertCache::Stats ExpertCache::stats() const {
  const auto free = std::ranges::count(slots_, nullptr);
  const auto capacity = static_cast<int64_t>(slots_.size());
  return {.capacity = capacity, .held = capacity - free, .uses = uses_, .hits = hits_};
}

void ExpertCache::read_ahead(const Expert& expert) const {
  will_need(expert.up_file, expert.up->bytes());
  will_need(expert.down_file, expert.down->bytes());
}

void ExpertCache::read_ahead_likely(int64_t layer) const {
  while (layer < static_cast<int64_t>(layers_.size()) && layers_[layer].empty()) ++layer;
  if (layer >= static_cast<int64_t>(layers_.size())) return;
  std::vector<const Expert*> likely;
  for (const Expert& expert : layers_[layer]) {
    if (expert.slot < 0 && expert.heat > 0) likely.push_back(&expert);
  }
  const auto count = std::min<int64_t>(kLikelyExperts, static_cast<int64_t>(likely.size()));
  std::ranges::partial_sort(likely, likely.begin() + count,
                            [](const Expert* a, const Expert* b) { return a->heat > b->heat; });
  for (int64_t i = 0; i < count; ++i) read_ahead(*likely[i]);
}

void ExpertCache::warm_up(Expert& expert) {
  expert.heat += heat_of_use_;
  if (expert.heat < kMostHeat) return;
  for (std::vector<Expert>& experts : layers_) {
    for (Expert& e : experts) e.heat /= kMostHeat;
  }
  heat_of_use_ /= kMostHeat;
}

void ExpertCache::admit(Expert& candidate) {
  if (slots_.empty()) return;
  // A free one, or that of the coldest expert.
  const auto slot = std::ranges::min_element(slots_, {}, [](const Expert* held) { return held ? held->heat : -1.0; });
  if (*slot) {
    if (candidate.heat < kWorthExchanging * (*slot)->heat) return;
    release(**slot);
  }
  hold(candidate, slot - slots_.begin());
}

void ExpertCache::hold(Expert& expert, int64_t slot) {
  char* const up = memory_.as<char>() + static_cast<size_t>(slot) * slot_bytes_;
  char* const down = up + padded(expert.up->bytes());
  std::memcpy(up, expert.up_file, expert.up->bytes());
  std::memcpy(down, expert.down_file, expert.down->bytes());
  expert.up->point_to(up);
  expert.down->point_to(down);
  expert.slot = slot;
  slots_[slot] = &expert;
}

void ExpertCache::release(Expert& expert) {
  slots_[expert.slot] = nullptr;
  expert.slot = -1;
  expert.up->point_to(expert.up_file);
  expert.down->point_to(expert.down_file);
}

}  // namespace coterie
