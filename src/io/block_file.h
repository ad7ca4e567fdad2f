// A file of named blocks of bytes: what is made once from other files and kept beside them, to be read or mapped whole.
//
//   "COTERIEB" | blocks, each from a multiple of 64 bytes on | index (JSON) | u64 bytes of the index | u64 its hash
//
// The index holds the format's version, a description by which a reader tells whether the file is the one that it
// wants, and name, offset, size and hash (XXH3) of every block. Such a file is never repaired: whoever finds it
// missing, foreign or damaged makes it anew.
#pragma once

#include <cstddef>
#include <map>
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

// Opened: the index is read and whole. Blocks may be used when read() or map() has been called.
class BlockFile {
 public:
  // Nothing when there is no such file, it has another description or version, or its index is damaged.
  static std::optional<BlockFile> open(const std::string& path, const std::string& description);

  // Reads everything into memory in huge pages, all threads together, and compares the hashes. False: a block is
  // damaged.
  bool read(ThreadPool& pool);
  void map();  // blocks lie in the mapped file; nothing is read, and no hash compared

  // The block in memory; data() is null when there is none of that name. It must not outlive the file.
  AlignedBuffer find(const std::string& name) const;

 private:
  explicit BlockFile(const std::string& path) : path_(path) {}

  std::string path_;
  std::map<std::string, Block> blocks_;
  size_t end_ = 0;  // of the last block
  AlignedBuffer memory_;
  std::optional<MappedFile> mapped_;
};

}  // namespace coterie
