#include "io/block_file.h"

#include <fcntl.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>

#include "base/check.h"
#include "coterie/error.h"
#include "io/json.h"

namespace coterie {
namespace {

constexpr char kMagic[] = "COTERIEB";
constexpr size_t kMagicBytes = 8, kAlignment = 64;
constexpr int kVersion = 1;

struct Trailer {
  uint64_t index_bytes = 0, index_hash = 0;
};

uint64_t hash_of(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

nlohmann::json block_json(const Block& b) { return {b.name, b.offset, b.bytes, b.hash}; }
Block block_of(const nlohmann::json& j) {
  return {j.at(0).get<std::string>(), j.at(1).get<size_t>(), j.at(2).get<size_t>(), j.at(3).get<uint64_t>()};
}

class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  bool is_open() const { return fd_ >= 0; }
  size_t size() const { return static_cast<size_t>(std::max<off_t>(0, lseek(fd_, 0, SEEK_END))); }
  bool read(void* out, size_t bytes, size_t offset) const {
    auto* next = static_cast<char*>(out);
    while (bytes > 0) {
      const ssize_t got = pread(fd_, next, bytes, static_cast<off_t>(offset));
      if (got <= 0) return false;
      next += got;
      offset += static_cast<size_t>(got);
      bytes -= static_cast<size_t>(got);
    }
    return true;
  }

 private:
  int fd_;
};

// The index of a file, or null when it is damaged.
nlohmann::json read_index(const Descriptor& file, size_t& index_offset) {
  char magic[kMagicBytes];
  Trailer trailer;
  const size_t size = file.size();
  if (size < kMagicBytes + sizeof trailer || !file.read(magic, kMagicBytes, 0)) return nullptr;
  if (std::memcmp(magic, kMagic, kMagicBytes) != 0) return nullptr;
  if (!file.read(&trailer, sizeof trailer, size - sizeof trailer)) return nullptr;
  if (trailer.index_bytes > size - kMagicBytes - sizeof trailer) return nullptr;
  index_offset = size - sizeof trailer - trailer.index_bytes;
  std::string text(trailer.index_bytes, '\0');
  if (!file.read(text.data(), text.size(), index_offset)) return nullptr;
  if (hash_of(text.data(), text.size()) != trailer.index_hash) return nullptr;
  return nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
}

}  // namespace

BlockFileWriter::BlockFileWriter(const std::string& path) : file_(path) {
  file_.write(kMagic, kMagicBytes);
  size_ = kMagicBytes;
}

void BlockFileWriter::align() {
  constexpr char kZeros[kAlignment] = {};
  const size_t padding = (kAlignment - size_ % kAlignment) % kAlignment;
  file_.write(kZeros, padding);
  size_ += padding;
}

void BlockFileWriter::add(const std::string& name, const void* data, size_t bytes) {
  align();
  file_.write(data, bytes);
  blocks_.push_back({name, size_, bytes, hash_of(data, bytes)});
  size_ += bytes;
}

void BlockFileWriter::commit(const std::string& description) {
  nlohmann::json index = {{"version", kVersion}, {"description", description}, {"blocks", nlohmann::json::array()}};
  for (const Block& block : blocks_) index["blocks"].push_back(block_json(block));
  const std::string text = index.dump();
  const Trailer trailer = {text.size(), hash_of(text.data(), text.size())};
  file_.write(text.data(), text.size());
  file_.write(&trailer, sizeof trailer);
  file_.commit();
}

std::optional<BlockFile> BlockFile::open(const std::string& path, const std::string& description) {
  const Descriptor file(path);
  if (!file.is_open()) return std::nullopt;
  BlockFile result(path);
  try {
    size_t index_offset = 0;
    const nlohmann::json index = read_index(file, index_offset);
    if (!index.is_object() || index.at("version") != kVersion || index.at("description") != description) return {};
    for (const nlohmann::json& entry : index.at("blocks")) {
      const Block block = block_of(entry);
      if (block.offset > index_offset || block.bytes > index_offset - block.offset) return {};
      result.end_ = std::max(result.end_, block.offset + block.bytes);
      result.blocks_[block.name] = block;
    }
  } catch (const nlohmann::json::exception&) {
    return {};
  }
  return result;
}

bool BlockFile::read(ThreadPool& pool) {
  const Descriptor file(path_);
  memory_ = AlignedBuffer(end_);
  std::vector<const Block*> blocks;
  for (const auto& [name, block] : blocks_) blocks.push_back(&block);
  std::ranges::sort(blocks, {}, [](const Block* block) { return block->offset; });
  std::atomic<bool> whole = file.is_open();
  pool.run(static_cast<int64_t>(blocks.size()), [&](int64_t i, int) {
    char* const data = memory_.as<char>() + blocks[i]->offset;
    const bool read = file.is_open() && file.read(data, blocks[i]->bytes, blocks[i]->offset);
    if (!read || hash_of(data, blocks[i]->bytes) != blocks[i]->hash) whole = false;
  });
  return whole;
}

void BlockFile::map() { mapped_.emplace(path_); }

AlignedBuffer BlockFile::find(const std::string& name) const {
  COTERIE_CHECK(mapped_ || memory_.data() || end_ == 0, "the file is neither read nor mapped");
  const auto found = blocks_.find(name);
  if (found == blocks_.end()) return {};
  const void* start = mapped_ ? static_cast<const void*>(mapped_->bytes().data()) : memory_.data();
  const char* data = static_cast<const char*>(start) + found->second.offset;
  return AlignedBuffer::borrowed(const_cast<char*>(data), found->second.bytes);
}

}  // namespace coterie
