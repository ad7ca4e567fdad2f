// Owned and mapped memory. Neither class may be used by two threads while one of them changes it;
// reading the bytes is safe from any number of threads.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace coterie {

// Memory aligned to 64 bytes (2 MiB, and advised to lie in huge pages, from 2 MiB on: page walks
// cost more than anything else when weights are streamed). Contents start undefined.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes);  // ResourceExhausted when there is no memory
  // Bytes that are taken for a buffer of so many.
  static size_t footprint(size_t bytes);
  // Somebody else's memory, of any alignment, which must outlive the buffer.
  static AlignedBuffer borrowed(void* data, size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;

  // Grows to at least `bytes`; contents are lost when it grows, nothing happens otherwise. Borrowed memory must
  // be large enough.
  void reserve(size_t bytes);

  void* data() { return data_; }
  const void* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() {
    return static_cast<T*>(data_);
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  bool owned_ = true;
};

// Has the system provide the pages of memory that was not touched yet, whatever is written there meanwhile. To touch
// them one by one can cost more than all that is done with them, above all in virtual machines. A hint: it may do
// nothing.
void provide_pages(void* data, size_t bytes);

// A whole file mapped read-only. InvalidArgument names a file that is missing or unreadable.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  std::string path_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace coterie
