#include "io/block_file.h"

#include <fcntl.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "coterie/error.h"
#include "io/json.h"

namespace coterie {

class ReadableFile {
 public:
  explicit ReadableFile(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~ReadableFile() {
    if (fd_ >= 0) close(fd_);
  }
  ReadableFile(const ReadableFile&) = delete;
  ReadableFile& operator=(const ReadableFile&) = delete;

  const std::string& path() const { return path_; }
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
  std::string path_;
  int fd_;
};

namespace {

constexpr char kMagic[] = "COTERIEB";
constexpr size_t kMagicBytes = 8, kAlignment = 64;
constexpr int kVersion = 1;
constexpr size_t kPiece = size_t{8} << 20;  // of a copy
constexpr size_t kHashedPiece = 256 << 10;  // stays in an L2 cache between reading and hashing

struct Trailer {
  uint64_t index_bytes = 0, index_hash = 0;
};

uint64_t hash_of(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

nlohmann::json block_json(const Block& b) { return {b.name, b.offset, b.bytes, b.hash}; }
Block block_of(const nlohmann::json& j) {
  return {j.at(0).get<std::string>(), j.at(1).get<size_t>(), j.at(2).get<size_t>(), j.at(3).get<uint64_t>()};
}

// Read piece by piece rather than looked at where it is mapped, which would make all of it resident.
bool is_whole(const ReadableFile& file, const Block& block) {
  thread_local std::vector<char> piece(kHashedPiece);
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (size_t done = 0; done < block.bytes; done += kHashedPiece) {
    const size_t bytes = std::min(kHashedPiece, block.bytes - done);
    if (!file.read(piece.data(), bytes, block.offset + done)) return false;
    XXH3_64bits_update(&state, piece.data(), bytes);
  }
  return XXH3_64bits_digest(&state) == block.hash;
}

// The index of a file, or null when it is damaged.
nlohmann::json read_index(const ReadableFile& file, size_t& index_offset) {
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
  BlockFile result;
  result.file_ = std::make_shared<const ReadableFile>(path);
  if (!result.file_->is_open()) return std::nullopt;
  try {
    size_t index_offset = 0;
    const nlohmann::json index = read_index(*result.file_, index_offset);
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
  result.mapped_.emplace(path);
  return result;
}

bool BlockFile::verify(ThreadPool& pool) const {
  std::vector<const Block*> blocks;
  for (const auto& [name, block] : blocks_) blocks.push_back(&block);
  std::ranges::sort(blocks, {}, [](const Block* block) { return block->offset; });
  std::atomic<bool> whole = true;
  pool.run(static_cast<int64_t>(blocks.size()), [&](int64_t i, int) {
    if (!is_whole(*file_, *blocks[i])) whole = false;
  });
  return whole;
}

AlignedBuffer BlockFile::copy(const std::atomic<bool>& stop) const {
  AlignedBuffer memory(end_);
  for (size_t offset = 0; offset < end_; offset += kPiece) {
    if (stop) return {};
    if (!file_->read(memory.as<char>() + offset, std::min(kPiece, end_ - offset), offset)) {
      throw CorruptFile(file_->path() + ": cannot be read any more");
    }
  }
  return memory;
}

void BlockFile::use(AlignedBuffer copy) {
  copy_ = std::move(copy);
  mapped_.reset();
}

const char* BlockFile::start() const {
  return mapped_ ? reinterpret_cast<const char*>(mapped_->bytes().data()) : copy_.as<char>();
}

AlignedBuffer BlockFile::find(const std::string& name) const {
  const auto found = blocks_.find(name);
  if (found == blocks_.end()) return {};
  return AlignedBuffer::borrowed(const_cast<char*>(start()) + found->second.offset, found->second.bytes);
}

}  // namespace coterie
