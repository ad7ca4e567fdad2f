// How ZeRO cuts parameters over the ranks that hold them alike, as arithmetic on sizes: nothing is allocated and no
// other rank need be there. ZeroOptimizer places its tensors by it, memory_plan.h counts bytes by it.
//
// Trained parameters that the same ranks hold, of one type, lie in buckets of about bucket_size elements, in the order
// in which backward passes finish them; every rank owns an equal stretch of each bucket. A parameter of one rank alone,
// and one without a gradient, is a bucket by itself, without padding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace coterie {

// The ranks that hold the same values; size 1: this rank alone.
struct ReplicaGroup {
  int64_t id = 0;  // equal for the parameters of equal ranks
  int64_t size = 1;
  int64_t rank = 0;  // of this rank within them
};

struct SizedParameter {
  int64_t size = 0;           // elements
  DType dtype = DType::kF32;  // fp32 or bf16
  bool trained = true;        // has a gradient
  ReplicaGroup replicas = {};
};

// A parameter's place in its bucket, in elements.
struct ZeroSlot {
  size_t parameter = 0;  // index in the list
  int64_t offset = 0, size = 0;
};

struct ZeroRange {
  int64_t begin = 0, size = 0;  // elements of a bucket
};

struct ZeroBucket {
  bool shared = false;  // by several ranks, over which its gradients are summed
  DType dtype = DType::kF32;
  std::vector<ZeroSlot> slots;                 // of a shared bucket at multiples of a cache line
  int64_t size = 0, share = 0, own_begin = 0;  // this rank owns [own_begin, own_begin + share)

  // What this rank keeps masters and moments of: its own stretch, or everything at stage 0.
  ZeroRange states(int64_t stage) const {
    return shared && stage > 0 ? ZeroRange{own_begin, share} : ZeroRange{0, size};
  }
};

// Shared buckets in the order in which backward passes complete them, then the others in the order of the list. Every
// rank of a group gets the same but for own_begin.
std::vector<ZeroBucket> zero_buckets(const std::vector<SizedParameter>& parameters, int64_t bucket_size);

// Sums of shared buckets under way at once, at most: a stage 2 rank holds so many whole buckets, and those that are
// being filled.
inline constexpr size_t kMaxSumsUnderWay = 2;

// The type of a shared bucket's gradients before they are summed over the ranks: below stage 2 they add up over the
// passes of a step first.
DType gradient_dtype(const ZeroBucket& bucket, int64_t stage, int64_t passes);

}  // namespace coterie
