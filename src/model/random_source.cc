#include "model/random_source.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "base/philox.h"
#include "coterie/error.h"

namespace coterie {
namespace {

constexpr size_t kBlock = 65521;  // prime
constexpr uint64_t kKey = 0x72616e646f6d2121;

// Normal numbers, by the transformation of Box and Muller.
std::vector<float> normal_block() {
  std::vector<float> block(kBlock);
  for (size_t i = 0; i < kBlock; ++i) {
    const float radius = std::sqrt(-2.0f * std::log(1.0f - philox_uniform(kKey, 0, i)));
    block[i] = radius * std::cos(2.0f * std::numbers::pi_v<float> * philox_uniform(kKey, 1, i));
  }
  return block;
}

}  // namespace

RandomSource::Values RandomSource::values_of(const TensorSpec& spec) {
  if (LogicalName(spec.name).kind != "weight") return {};
  if (spec.shape.size() == 1) return {.constant = 1.0f};
  return {.deviation = 1.0f / std::sqrt(static_cast<float>(spec.shape.back()))};
}

RandomSource::RandomSource(std::string path, const CheckpointMap& map)
    : path_(std::move(path)), block_(normal_block()) {
  for (const MappedTensor& tensor : map.tensors) {
    for (const Piece& piece : tensor.forms.front()) {
      if (!index_.emplace(piece.stored, tensors_.size()).second) continue;
      StoredTensor stored = {.name = piece.stored, .shape = piece.stored_shape, .dtype = "F32"};
      stored.bytes = stored.num_elements() * sizeof(float);
      tensors_.push_back(std::move(stored));
      values_.push_back(values_of(tensor.spec));
    }
  }
}

const StoredTensor* RandomSource::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

void RandomSource::read(const std::string& name, float* out) const {
  const auto found = index_.find(name);
  if (found == index_.end()) throw InvalidArgument(path_ + ": " + name + ": no such tensor");
  const Values values = values_[found->second];
  const auto size = static_cast<size_t>(tensors_[found->second].num_elements());
  if (values.deviation == 0.0f) {
    std::fill_n(out, size, values.constant);
    return;
  }
  // Tensors begin at different places of the block; neighbours in the file far from each other.
  size_t at = found->second * 7919 % kBlock;
  for (size_t i = 0; i < size;) {
    const size_t n = std::min(kBlock - at, size - i);
    for (size_t j = 0; j < n; ++j) out[i + j] = values.deviation * block_[at + j];
    i += n;
    at = 0;
  }
}

}  // namespace coterie
