#include "engine/kv_cache.h"

#include <algorithm>
#include <string>

#include "base/check.h"
#include "coterie/error.h"

namespace coterie {
namespace {

// Of one layer of a block.
int64_t bytes_of_layer(const ModelConfig& config, DType dtype, int64_t block_size) {
  return KvBlock(dtype, block_size, config.cache_heads(), config.cache_key_dim(), config.cache_value_dim()).bytes();
}

// Of memory that is provided ahead of its use, at most.
constexpr int64_t kProvidedTokens = 4096;
constexpr size_t kProvidedBytes = size_t{256} << 20;

constexpr KvCache::Prefix kRootOfLength = KvCache::Prefix{1} << 63;  // published chains are counted from 1

}  // namespace

KvCache::KvCache(const ModelConfig& config, DType dtype, int64_t block_size, int64_t max_blocks, bool keep_released)
    : dtype_(dtype),
      block_size_(block_size),
      num_layers_(config.num_layers()),
      layer_bytes_(bytes_of_layer(config, dtype, block_size)),
      slab_blocks_(blocks_of_slab()),
      has_values_(config.cache_value_dim() > 0),
      rope_scaling_(config.rope_scaling),
      max_blocks_(max_blocks),
      keep_released_(keep_released) {}

int64_t KvCache::blocks_of_slab() const {
  const auto most = static_cast<int64_t>(kProvidedBytes / 2 / slab_bytes(1));  // two of them are provided at least
  const int64_t blocks = std::max<int64_t>(1, std::min(kSlabTokens / block_size_, most));
  return static_cast<int64_t>(AlignedBuffer::footprint(slab_bytes(blocks)) / slab_bytes(1));
}

int64_t KvCache::block_bytes(const ModelConfig& config, DType dtype, int64_t block_size) {
  return config.num_layers() * bytes_of_layer(config, dtype, block_size);
}

KvCache::Prefix KvCache::root(int64_t length) const {
  const int64_t turning = rope_scaling_.turning_length(length);
  return turning == rope_scaling_.turning_length(1) ? kEmptyPrefix : kRootOfLength | static_cast<Prefix>(turning);
}

void KvCache::provide_memory() {
  if (!provider_) {
    provider_.emplace();
    if (num_held_ > 0) provider_->pause();
  }
  const int64_t whole_slabs_left = (max_blocks_ - static_cast<int64_t>(blocks_.size())) / slab_blocks_;
  const auto affordable = static_cast<int64_t>(kProvidedBytes / slab_bytes(slab_blocks_));
  const int64_t count = std::min({blocks_for(kProvidedTokens) / slab_blocks_, affordable, whole_slabs_left});
  try {
    while (static_cast<int64_t>(provided_slabs_.size()) < count) {
      AlignedBuffer& slab = provided_slabs_.emplace_back(slab_bytes(slab_blocks_));
      provider_->provide({slab.as<std::byte>(), slab.size()});
    }
  } catch (const ResourceExhausted&) {  // it is only needed later, or never
  }
}

int32_t KvCache::allocate() {
  if (num_free() == 0) {
    throw ResourceExhausted("KV cache: all " + std::to_string(max_blocks_) + " blocks are in use");
  }
  if (free_.empty() && static_cast<int64_t>(blocks_.size()) < max_blocks_) add_slab();
  if (free_.empty()) forget(idle_.front());
  const int32_t block = free_.back();
  free_.pop_back();
  blocks_[block].holders = 1;
  count_held(+1);
  return block;
}

void KvCache::count_held(int64_t change) {
  const bool was_idle = num_held_ == 0;
  num_held_ += change;
  if (!provider_ || was_idle == (num_held_ == 0)) return;
  was_idle ? provider_->pause() : provider_->resume();
}

void KvCache::release(int32_t block) {
  Block& b = blocks_[block];
  COTERIE_CHECK(b.holders > 0, "a block is given back twice");
  if (--b.holders > 0) return;
  count_held(-1);
  if (b.prefix == kEmptyPrefix) return free_.push_back(block);
  b.idle = idle_.insert(idle_.end(), block);
  if (!keep_released_) forget(block);
}

std::optional<KvCache::CachedBlock> KvCache::find(Prefix before, std::span<const int32_t> token_ids) {
  const auto found = published_.find({before, {token_ids.begin(), token_ids.end()}});
  if (found == published_.end()) return {};
  Block& b = blocks_[found->second];
  if (b.holders++ == 0) {
    idle_.erase(b.idle);
    count_held(+1);
  }
  return CachedBlock{found->second, b.prefix};
}

KvCache::Prefix KvCache::publish(Prefix before, std::span<const int32_t> token_ids, int32_t block) {
  Block& b = blocks_[block];
  b.key.before = before;
  b.key.token_ids.assign(token_ids.begin(), token_ids.end());
  const auto [entry, is_new] = published_.try_emplace(b.key, block);
  if (is_new) b.prefix = ++last_prefix_;
  return blocks_[entry->second].prefix;
}

// Of an idle block.
void KvCache::forget(int32_t block) {
  Block& b = blocks_[block];
  published_.erase(b.key);
  idle_.erase(b.idle);
  b.prefix = kEmptyPrefix;
  free_.push_back(block);
}

void KvCache::add_slab() {
  const auto first = static_cast<int64_t>(blocks_.size());
  const int64_t count = std::min(slab_blocks_, max_blocks_ - first);
  if (provided_slabs_.empty()) {
    slabs_.emplace_back(slab_bytes(count));
  } else {
    slabs_.push_back(std::move(provided_slabs_.front()));
    provided_slabs_.pop_front();
  }
  blocks_.resize(first + count);
  if (provider_) provide_memory();
  for (int64_t block = first + count - 1; block >= first; --block) free_.push_back(static_cast<int32_t>(block));
}

size_t KvCache::KeyHash::operator()(const Key& key) const {
  uint64_t hash = key.before;
  for (const int32_t token : key.token_ids) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio: spreads bits
    hash ^= hash >> 29;
  }
  return hash;
}

void* KvCache::data(int32_t block, int64_t layer) const {
  const int64_t layers_before = (block % slab_blocks_) * num_layers_ + layer;
  const void* data = slabs_[block / slab_blocks_].data();
  return static_cast<char*>(const_cast<void*>(data)) + layers_before * layer_bytes_;
}

BlockTable::BlockTable(KvCache& cache) : cache_(cache), data_L_(cache.num_layers()), views_L_(cache.num_layers()) {}

void BlockTable::reserve(int64_t num_tokens) {
  while (num_blocks() < cache_.blocks_for(num_tokens)) append(cache_.allocate());
}

void BlockTable::append(int32_t block) {
  blocks_.push_back(block);
  for (int64_t layer = 0; layer < cache_.num_layers(); ++layer) {
    data_L_[layer].push_back(cache_.data(block, layer));
    views_L_[layer] = {data_L_[layer].data(), cache_.dtype(), cache_.block_size(), cache_.has_values()};
  }
}

// The last blocks first: of a chain whose memory is needed, the end is forgotten before the beginning.
void BlockTable::trim(int64_t num_tokens) {
  const int64_t kept = cache_.blocks_for(num_tokens);
  for (; num_blocks() > kept; blocks_.pop_back()) cache_.release(blocks_.back());
  for (std::vector<void*>& data : data_L_) data.resize(blocks_.size());
}

}  // namespace coterie
