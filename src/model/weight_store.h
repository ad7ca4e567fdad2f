// Where packed weights lie: in memory of their own, or in a file beside the model that is made once, so that the next
// start packs nothing.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "io/block_file.h"

namespace coterie {

// Blocks of bytes by name. The memory of a block lives as long as the store.
class WeightStore {
 public:
  virtual ~WeightStore() = default;

  // The block, filled by `fill` unless it is there already.
  virtual AlignedBuffer block(const std::string& name, size_t bytes,
                              const std::function<void(AlignedBuffer)>& fill) = 0;
  virtual bool has(const std::string&) const { return false; }
};

// In huge pages, many blocks to a slab.
class MemoryStore : public WeightStore {
 public:
  AlignedBuffer block(const std::string& name, size_t bytes, const std::function<void(AlignedBuffer)>& fill) override;

 private:
  std::vector<AlignedBuffer> slabs_;
  size_t used_ = 0;  // of the last slab
};

// Writes every block to a file and forgets it: what it hands out is void at the next call. Takes the memory of the
// largest block.
class WritingStore : public WeightStore {
 public:
  explicit WritingStore(const std::string& path) : writer_(path) {}
  AlignedBuffer block(const std::string& name, size_t bytes, const std::function<void(AlignedBuffer)>& fill) override;
  void commit(const std::string& description) { writer_.commit(description); }

 private:
  BlockFileWriter writer_;
  AlignedBuffer scratch_;
};

class FileStore : public WeightStore {
 public:
  explicit FileStore(BlockFile file) : file_(std::move(file)) {}
  BlockFile& file() { return file_; }
  AlignedBuffer block(const std::string& name, size_t bytes, const std::function<void(AlignedBuffer)>& fill) override;
  bool has(const std::string& name) const override { return file_.find(name).data() != nullptr; }

 private:
  BlockFile file_;
};

// The file with a model's packed weights.
struct WeightCache {
  std::string path;         // empty: none
  std::string description;  // of what is in it, and of the files that it was made from
  bool verified = true;     // compare the hashes of its blocks, which reads all of it
  bool required = false;    // refuse where it cannot be written
};

// Of the model at `model_path` (a directory or a file), beside it or in a directory for many models: one file for each
// combination of types and layout of panels.
WeightCache weight_cache(const std::string& model_path, const std::string& types, const std::string& directory = "");

// The file, mapped, as a store; made by `pack` when it is missing, stale or damaged. When it cannot be written,
// null, or where it is required InvalidArgument.
std::unique_ptr<WeightStore> cached_weights(const WeightCache& cache, const std::function<void(WeightStore&)>& pack,
                                            ThreadPool& pool);

}  // namespace coterie
