// The paged KV cache: one pool of blocks for all sequences, each sequence with a table of the blocks
// that hold its tokens. A block holds kBlockSize tokens of every layer, keys and values.
// One thread at a time. Legend: L layers, G KV heads, d head_dim.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/dtype.h"
#include "base/memory.h"
#include "kernels/attention.h"
#include "model/config.h"

namespace coterie {

class KvCache {
 public:
  static constexpr int64_t kBlockSize = 16;

  // Memory is taken as blocks are first used, in slabs of kSlabBlocks, up to max_blocks.
  KvCache(const ModelConfig& config, DType dtype, int64_t max_blocks);

  static int64_t blocks_for(int64_t num_tokens) { return (num_tokens + kBlockSize - 1) / kBlockSize; }

  int32_t allocate();  // ResourceExhausted when all blocks are in use
  void release(int32_t block);

  // Keys or values of one layer of a block: [G, kBlockSize, d].
  void* keys(int32_t block, int64_t layer) const { return at(block, 2 * layer); }
  void* values(int32_t block, int64_t layer) const { return at(block, 2 * layer + 1); }

  int64_t num_layers() const { return num_layers_; }
  DType dtype() const { return dtype_; }
  int64_t num_free() const { return max_blocks_ - num_allocated_; }

 private:
  static constexpr int64_t kSlabBlocks = 32;

  void* at(int32_t block, int64_t part) const;

  DType dtype_;
  int64_t num_layers_;
  int64_t part_bytes_;  // keys or values of one layer of one block
  int64_t max_blocks_;
  int64_t num_allocated_ = 0;
  std::vector<AlignedBuffer> slabs_;
  std::vector<int32_t> free_;  // blocks of the slabs, used last in first out
};

// The blocks of one sequence; they go back to the pool with the table.
class BlockTable {
 public:
  explicit BlockTable(KvCache& cache);  // cache must outlive the table
  ~BlockTable();
  BlockTable(const BlockTable&) = delete;
  BlockTable& operator=(const BlockTable&) = delete;

  // Makes room for the first num_tokens tokens. Views handed out before are void when it grows.
  void reserve(int64_t num_tokens);

  std::span<const PagedKv> layers() const { return views_L_; }
  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }

 private:
  KvCache& cache_;
  std::vector<int32_t> blocks_;
  std::vector<std::vector<void*>> keys_L_, values_L_;  // [L][blocks]
  std::vector<PagedKv> views_L_;
};

}  // namespace coterie
