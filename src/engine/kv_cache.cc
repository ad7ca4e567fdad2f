#include "engine/kv_cache.h"

#include <string>

#include "coterie/error.h"

namespace coterie {

KvCache::KvCache(const ModelConfig& config, DType dtype, int64_t max_blocks)
    : dtype_(dtype),
      num_layers_(config.num_layers()),
      part_bytes_(config.num_kv_heads * kBlockSize * config.head_dim * static_cast<int64_t>(dtype_size(dtype))),
      max_blocks_(max_blocks) {}

int32_t KvCache::allocate() {
  if (num_allocated_ == max_blocks_) {
    throw ResourceExhausted("KV cache: all " + std::to_string(max_blocks_) + " blocks are in use");
  }
  if (free_.empty()) {
    const auto first = static_cast<int32_t>(slabs_.size() * kSlabBlocks);
    slabs_.emplace_back(kSlabBlocks * num_layers_ * 2 * part_bytes_);
    for (int32_t block = first + kSlabBlocks - 1; block >= first; --block) free_.push_back(block);
  }
  const int32_t block = free_.back();
  free_.pop_back();
  ++num_allocated_;
  return block;
}

void KvCache::release(int32_t block) {
  free_.push_back(block);
  --num_allocated_;
}

void* KvCache::at(int32_t block, int64_t part) const {
  const int64_t parts_before = (block % kSlabBlocks) * num_layers_ * 2 + part;
  const void* data = slabs_[block / kSlabBlocks].data();
  return static_cast<char*>(const_cast<void*>(data)) + parts_before * part_bytes_;
}

BlockTable::BlockTable(KvCache& cache)
    : cache_(cache), keys_L_(cache.num_layers()), values_L_(cache.num_layers()), views_L_(cache.num_layers()) {}

BlockTable::~BlockTable() {
  for (const int32_t block : blocks_) cache_.release(block);
}

void BlockTable::reserve(int64_t num_tokens) {
  while (num_blocks() < KvCache::blocks_for(num_tokens)) {
    const int32_t block = cache_.allocate();
    blocks_.push_back(block);
    for (int64_t layer = 0; layer < cache_.num_layers(); ++layer) {
      keys_L_[layer].push_back(cache_.keys(block, layer));
      values_L_[layer].push_back(cache_.values(block, layer));
      views_L_[layer] = {keys_L_[layer].data(), values_L_[layer].data(), cache_.dtype(), KvCache::kBlockSize};
    }
  }
}

}  // namespace coterie
