// The paged KV cache: one pool of blocks for all sequences, each sequence with a table of the blocks
// that hold its tokens. A block holds block_size tokens of every layer, keys and values; several tables may
// hold the same block.
//
// It is also the prefix cache: a full block may be published under its tokens and all that came before them. Blocks
// that nobody holds keep what was published until their memory is needed, the least recently used first.
// One thread at a time. Legend: L layers, G KV heads, d head_dim.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/dtype.h"
#include "base/memory.h"
#include "base/page_provider.h"
#include "base/round.h"
#include "kernels/attention.h"
#include "model/config.h"

namespace coterie {

class KvCache {
 public:
  // Stands for the contents of a chain of full blocks from a sequence's start. Never given twice.
  using Prefix = uint64_t;
  static constexpr Prefix kEmptyPrefix = 0;
  struct CachedBlock {
    int32_t block = 0;
    Prefix prefix = kEmptyPrefix;  // of the chain that ends with the block
  };

  // Memory is taken as blocks are first used, in slabs of kSlabTokens and what else their pages hold, up to max_blocks.
  // Unless keep_released, blocks that nobody holds are forgotten at once.
  KvCache(const ModelConfig& config, DType dtype, int64_t block_size, int64_t max_blocks, bool keep_released = true);

  // Of all layers.
  static int64_t block_bytes(const ModelConfig& config, DType dtype, int64_t block_size);

  // From now on, has memory for the next 4096 tokens, at most 256 MiB, ready before they come: it is provided while
  // nobody holds a block.
  void provide_memory();

  int32_t allocate();  // with one holder; ResourceExhausted when all blocks are held
  void release(int32_t block);

  // The block that was published for these tokens behind `before`, with one holder more; none where nobody did, or
  // where it is forgotten.
  std::optional<CachedBlock> find(Prefix before, std::span<const int32_t> token_ids);
  // Makes a held, full block known. Another one with the same contents stays the known one.
  Prefix publish(Prefix before, std::span<const int32_t> token_ids, int32_t block);

  // Where the chain of a sequence begins whose tokens turn as those of one of that length. Beyond the original context,
  // keys of a model whose rotary positions are stretched by the length of the prompt (RopeScalingKind::kDynamic) are of
  // use to prompts of that length alone, under kLongrope to all that are longer as well.
  Prefix root(int64_t length) const;
  int64_t longest_alike(int64_t length) const { return rope_scaling_.longest_alike(length); }

  // One layer of a block, as kernels/attention.h has it.
  void* data(int32_t block, int64_t layer) const;
  bool has_values() const { return has_values_; }  // of their own: in latent attention keys hold them

  int64_t block_size() const { return block_size_; }
  int64_t blocks_for(int64_t num_tokens) const { return ceil_div(num_tokens, block_size_); }
  int64_t num_layers() const { return num_layers_; }
  DType dtype() const { return dtype_; }
  int64_t num_blocks() const { return max_blocks_; }
  int64_t num_free() const { return max_blocks_ - num_held_; }

 private:
  static constexpr int64_t kSlabTokens = 1024;

  struct Key {
    Prefix before = kEmptyPrefix;
    std::vector<int32_t> token_ids = {};

    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  struct Block {
    int64_t holders = 0;
    Prefix prefix = kEmptyPrefix;  // kEmptyPrefix: not published
    Key key;
    std::list<int32_t>::iterator idle;  // its place in idle_, while published and not held
  };

  size_t slab_bytes(int64_t num_blocks) const { return static_cast<size_t>(num_blocks * num_layers_ * layer_bytes_); }
  int64_t blocks_of_slab() const;  // as many as its pages hold
  void add_slab();
  void count_held(int64_t change);
  void forget(int32_t block);

  DType dtype_;
  int64_t block_size_;
  int64_t num_layers_;
  int64_t layer_bytes_;  // of one block
  int64_t slab_blocks_;
  bool has_values_;
  RopeScaling rope_scaling_;
  int64_t max_blocks_;
  bool keep_released_;
  int64_t num_held_ = 0;
  Prefix last_prefix_ = kEmptyPrefix;
  std::vector<AlignedBuffer> slabs_;
  std::vector<Block> blocks_;  // of all slabs
  std::vector<int32_t> free_;  // neither held nor published, used last in first out
  std::list<int32_t> idle_;    // published and not held, least recently used first
  std::unordered_map<Key, int32_t, KeyHash> published_;
  std::deque<AlignedBuffer> provided_slabs_;  // in the order of use
  std::optional<PageProvider> provider_;      // of their pages
};

// The blocks of one sequence; the table gives them back when it goes.
class BlockTable {
 public:
  explicit BlockTable(KvCache& cache);  // cache must outlive the table
  ~BlockTable() { clear(); }
  BlockTable(const BlockTable&) = delete;
  BlockTable& operator=(const BlockTable&) = delete;

  // Makes room for the first num_tokens tokens. Views handed out before are void when it grows.
  void reserve(int64_t num_tokens);
  void append(int32_t block);     // one that the caller holds; the table holds it from now on
  void trim(int64_t num_tokens);  // gives back the blocks behind the first num_tokens tokens
  void clear() { trim(0); }

  int32_t block(int64_t i) const { return blocks_[i]; }
  std::span<const PagedKv> layers() const { return views_L_; }
  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }

 private:
  KvCache& cache_;
  std::vector<int32_t> blocks_;
  std::vector<std::vector<void*>> data_L_;  // [L][blocks]
  std::vector<PagedKv> views_L_;
};

}  // namespace coterie
