#include "base/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/round.h"
#include "coterie/error.h"

namespace coterie {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t alignment(size_t bytes) { return bytes >= kHugePage ? kHugePage : kCacheLine; }

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  data_ = std::aligned_alloc(alignment(bytes), footprint(bytes));
  if (!data_) throw ResourceExhausted("no memory for a buffer of " + std::to_string(bytes) + " bytes");
  if (bytes >= kHugePage) madvise(data_, footprint(bytes), MADV_HUGEPAGE);  // a hint: failure is harmless
}

size_t AlignedBuffer::footprint(size_t bytes) { return round_up(bytes, alignment(bytes)); }

AlignedBuffer AlignedBuffer::borrowed(void* data, size_t bytes) {
  AlignedBuffer buffer;
  buffer.data_ = data;
  buffer.size_ = bytes;
  buffer.owned_ = false;
  return buffer;
}

AlignedBuffer::~AlignedBuffer() {
  if (owned_) std::free(data_);
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      owned_(std::exchange(other.owned_, true)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(owned_, other.owned_);
  return *this;
}

void AlignedBuffer::reserve(size_t bytes) {
  if (bytes <= size_) return;
  COTERIE_CHECK(owned_, "borrowed memory cannot grow");
  *this = AlignedBuffer(bytes);
}

void provide_pages(void* data, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(data), page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw InvalidArgument(path + ": " + std::strerror(errno));
  struct stat status;
  if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(fd);
    throw InvalidArgument(path + ": not a regular file");
  }
  size_ = static_cast<size_t>(status.st_size);
  if (size_ > 0) {
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data_ == MAP_FAILED) {
      data_ = nullptr;
      close(fd);
      throw ResourceExhausted(path + ": cannot map " + std::to_string(size_) + " bytes: " + std::strerror(errno));
    }
  }
  close(fd);
}

MappedFile::~MappedFile() {
  if (data_) munmap(data_, size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace coterie
