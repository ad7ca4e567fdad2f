// A file of named blocks of bytes: what is made once from other files and kept beside them.
//
//   "COTERIEB" | blocks, each from a multiple of 64 bytes on | index (JSON) | u64 bytes of the index | u64 its hash
//
// The index holds the format's version, a description by which a reader tells whether the file is the one that it
// wants, and name, offset, size and hash (XXH3) of every block. Such a file is never repaired: whoever finds it
// missing, foreign or damaged makes it anew.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "io/atomic_file.h"

namespace coterie {

struct Block {
  std::string name;
  size_t offset = 0, bytes = 0;
  uint64_t hash = 0;
};

class ReadableFile;

class BlockFileWriter {
 public:
  explicit BlockFileWriter(const std::string& path);  // throws as AtomicFile does

  void add(const std::string& name, const void* data, size_t bytes);
  void commit(const std::string& description);  // without it nothing is left behind

 private:
  void align();

  AtomicFile file_;
  size_t size_ = 0;
  std::vector<Block> blocks_;
};

// Opened: the index is read and whole, and the blocks are mapped where they lie.
class BlockFile {
 public:
  // Nothing when there is no such file, it has another description or version, or its index is damaged.
  static std::optional<BlockFile> open(const std::string& path, const std::string& description);

  bool verify(ThreadPool& pool) const;  // compares the hashes of all blocks, which reads them; false: one is damaged

  size_t size() const { return end_; }  // bytes up to the end of the last block

  // A copy of the file in huge pages, which costs as much again as the reading; ends early, with nothing, when `stop`
  // is set. Any thread. CorruptFile when it cannot be read any more.
  AlignedBuffer copy(const std::atomic<bool>& stop) const;
  // Blocks lie in such a copy from now on. What find() gave before is void.
  void use(AlignedBuffer copy);
  const char* start() const;  // where the file's first byte is: of the map, or of the copy

  // The block in memory; data() is null when there is none of that name. It must not outlive the file.
  AlignedBuffer find(const std::string& name) const;

 private:
  BlockFile() = default;

  std::shared_ptr<const ReadableFile> file_;  // stays open: another may take its name
  std::map<std::string, Block> blocks_;
  size_t end_ = 0;
  std::optional<MappedFile> mapped_;
  AlignedBuffer copy_;  // when mapped_ is empty
};

}  // namespace coterie
