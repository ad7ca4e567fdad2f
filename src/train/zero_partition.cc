#include "train/zero_partition.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/round.h"

namespace coterie {
namespace {

// Elements that the places of parameters are multiples of: a cache line in either type.
constexpr int64_t kAlignment = 32;

bool is_shared(const SizedParameter& parameter) { return parameter.replicas.size > 1 && parameter.trained; }

// Pads the bucket to equal shares.
void share_out(ZeroBucket& bucket, const ReplicaGroup& ranks) {
  bucket.size = round_up(bucket.size, kAlignment * ranks.size);
  bucket.share = bucket.size / ranks.size;
  bucket.own_begin = bucket.share * ranks.rank;
}

// Backward passes finish parameters in about the reverse order of their list. Small fp32 ones of a bf16 model fill
// their bucket slowly, so that buckets are sorted by what they wait for.
std::vector<ZeroBucket> shared_buckets(const std::vector<SizedParameter>& parameters, int64_t bucket_size) {
  std::vector<ZeroBucket> buckets;
  std::map<std::pair<int64_t, DType>, size_t> open;
  for (size_t i = parameters.size(); i-- > 0;) {
    const SizedParameter& parameter = parameters[i];
    if (!is_shared(parameter)) continue;
    const std::pair key(parameter.replicas.id, parameter.dtype);
    const auto found = open.find(key);
    if (found == open.end() || buckets[found->second].size + parameter.size > bucket_size) {
      open[key] = buckets.size();
      buckets.push_back({.shared = true, .dtype = parameter.dtype});
    }
    ZeroBucket& bucket = buckets[open[key]];
    bucket.slots.push_back({i, bucket.size, parameter.size});
    bucket.size += round_up(parameter.size, kAlignment);
  }
  std::sort(buckets.begin(), buckets.end(), [](const ZeroBucket& a, const ZeroBucket& b) {
    return a.slots.back().parameter > b.slots.back().parameter;
  });
  for (ZeroBucket& bucket : buckets) share_out(bucket, parameters[bucket.slots[0].parameter].replicas);
  return buckets;
}

}  // namespace

std::vector<ZeroBucket> zero_buckets(const std::vector<SizedParameter>& parameters, int64_t bucket_size) {
  std::vector<ZeroBucket> buckets = shared_buckets(parameters, bucket_size);
  for (size_t i = 0; i < parameters.size(); ++i) {
    const SizedParameter& parameter = parameters[i];
    if (is_shared(parameter)) continue;
    buckets.push_back(
        {.dtype = parameter.dtype, .slots = {{i, 0, parameter.size}}, .size = parameter.size, .share = parameter.size});
  }
  return buckets;
}

DType gradient_dtype(const ZeroBucket& bucket, int64_t stage, int64_t passes) {
  return stage < 2 && passes > 1 ? DType::kF32 : bucket.dtype;
}

}  // namespace coterie
