#include "io/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "base/memory.h"
#include "coterie/error.h"

namespace coterie {
namespace {

[[noreturn]] void throw_errno(const std::string& path, const char* what, int error) {
  const std::string message = path + ": cannot " + what + ": " + std::strerror(error);
  const bool exhausted = error == ENOSPC || error == EDQUOT || error == EFBIG || error == EMFILE || error == ENFILE;
  if (exhausted) throw ResourceExhausted(message);
  throw InvalidArgument(message);
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) : path_(path), temporary_path_(path + ".tmp") {
  fd_ = open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail("create");
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_path_.c_str());
}

void AtomicFile::fail(const char* what) const { throw_errno(temporary_path_, what, errno); }

void AtomicFile::write(const void* data, size_t bytes) {
  constexpr size_t kMaxWrite = size_t{1} << 30;  // Linux writes at most 2 GiB in one call
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd_, next, std::min(bytes, kMaxWrite));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("write");
    }
    next += written;
    bytes -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  COTERIE_CHECK(fd_ >= 0, "committed twice");
  if (fsync(fd_) != 0) fail("fsync");
  if (rename(temporary_path_.c_str(), path_.c_str()) != 0) fail("rename");
  close(fd_);
  fd_ = -1;
  sync_directory(std::filesystem::path(path_).parent_path().string());
}

void sync_directory(const std::string& directory) {
  const std::string path = directory.empty() ? "." : directory;
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) throw_errno(path, "open", errno);
  const int result = fsync(fd);
  const int error = errno;
  close(fd);
  if (result != 0 && error != EINVAL) throw_errno(path, "fsync", error);  // EINVAL: a file system without it
}

void write_text_file(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

std::string read_text_file(const std::string& path) {
  const MappedFile file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace coterie
