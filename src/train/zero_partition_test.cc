// The layout of ZeRO's buckets over random lists of parameters, as all ranks together see it.
#include "train/zero_partition.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>

namespace coterie {
namespace {

constexpr int64_t kRanks = 8, kBucket = 1000;

// A parameter of the whole run: what degree - 0: all ranks hold all of it - ranks together hold.
struct Drawn {
  int64_t size, degree;
  DType dtype;
  bool trained;
};

std::vector<Drawn> draw(unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Drawn> drawn(3 + random() % 40);
  for (Drawn& d : drawn) {
    d.size = random() % 4 == 0 ? 1 + random() % 3 : 1 + random() % (2 * kBucket);
    d.degree = std::vector<int64_t>{0, 0, 1, 2, 4, 8}[random() % 6];
    d.dtype = random() % 3 == 0 ? DType::kF32 : DType::kBF16;
    d.trained = random() % 10 != 0;
  }
  return drawn;
}

// The ranks of one place in their expert-parallel groups hold the same.
int64_t place_of(const Drawn& drawn, int64_t rank) { return drawn.degree == 0 ? 0 : rank % drawn.degree; }

std::vector<SizedParameter> parameters_of(const std::vector<Drawn>& drawn, int64_t rank) {
  std::vector<SizedParameter> parameters;
  for (const Drawn& d : drawn) {
    const int64_t neighbours = std::max<int64_t>(d.degree, 1);
    parameters.push_back({d.size, d.dtype, d.trained, {d.degree, kRanks / neighbours, rank / neighbours}});
  }
  return parameters;
}

TEST(ZeroPartition, EveryElementIsOwnedOnce) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    const std::vector<Drawn> drawn = draw(seed);
    for (const int64_t stage : {1, 2}) {
      std::map<std::pair<size_t, int64_t>, std::vector<int>> owners;  // of each element of (parameter, place)
      for (int64_t rank = 0; rank < kRanks; ++rank) {
        for (const ZeroBucket& bucket : zero_buckets(parameters_of(drawn, rank), kBucket)) {
          const auto [begin, size] = bucket.states(stage);
          for (const ZeroSlot& slot : bucket.slots) {
            const Drawn& d = drawn[slot.parameter];
            ASSERT_EQ(slot.size, d.size);
            if (!d.trained) continue;  // kept by all that hold it
            std::vector<int>& owned = owners[{slot.parameter, place_of(d, rank)}];
            owned.resize(static_cast<size_t>(d.size));
            const int64_t end = std::min(begin + size, slot.offset + slot.size);
            for (int64_t e = std::max(begin, slot.offset); e < end; ++e) ++owned[static_cast<size_t>(e - slot.offset)];
          }
        }
      }
      for (const auto& [of, owned] : owners) {
        ASSERT_TRUE(std::ranges::all_of(owned, [](int n) { return n == 1; })) << "seed " << seed << ": " << of.first;
      }
    }
  }
}

// Slots don't overlap, buckets are no larger than they may be, and ranks differ in nothing but what they own.
TEST(ZeroPartition, RanksLayOutAlike) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    const std::vector<Drawn> drawn = draw(seed);
    const std::vector<ZeroBucket> first = zero_buckets(parameters_of(drawn, 0), kBucket);
    size_t num_slots = 0;
    for (const ZeroBucket& bucket : first) {
      int64_t end = 0;
      for (const ZeroSlot& slot : bucket.slots) {
        EXPECT_GE(slot.offset, end);
        end = slot.offset + slot.size;
        EXPECT_EQ(drawn[slot.parameter].dtype, bucket.dtype);
      }
      EXPECT_LE(end, bucket.size);
      EXPECT_TRUE(bucket.slots.size() == 1 || end <= kBucket);
      num_slots += bucket.slots.size();
    }
    EXPECT_EQ(num_slots, drawn.size());
    for (int64_t rank = 1; rank < kRanks; ++rank) {
      const std::vector<ZeroBucket> other = zero_buckets(parameters_of(drawn, rank), kBucket);
      ASSERT_EQ(other.size(), first.size());
      for (size_t b = 0; b < first.size(); ++b) {
        EXPECT_EQ(other[b].size, first[b].size);
        EXPECT_EQ(other[b].share, first[b].share);
        EXPECT_EQ(other[b].slots[0].parameter, first[b].slots[0].parameter);
      }
    }
  }
}

TEST(ZeroPartition, StageZeroKeepsEverything) {
  const std::vector<SizedParameter> parameters = {{100, DType::kBF16, true, {0, 4, 3}}};
  const ZeroBucket bucket = zero_buckets(parameters, kBucket).at(0);
  EXPECT_EQ(bucket.size, 128);  // four shares of a cache line each
  EXPECT_EQ(bucket.states(0).size, 128);
  EXPECT_EQ(bucket.states(1).begin, 96);
  EXPECT_EQ(bucket.states(2).size, 32);
}

}  // namespace
}  // namespace coterie
