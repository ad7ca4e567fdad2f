// Files written aside and renamed, so that a reader (or a machine that lost power) sees the old file
// or the whole new one, never a part.
#pragma once

#include <cstddef>
#include <string>

namespace coterie {

// Writes path + ".tmp"; commit() makes it `path`. Without commit() the temporary file is removed.
// One thread; two writers of one path are the caller's mistake.
// ResourceExhausted when the disk is full, InvalidArgument when the path cannot be written.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void commit();  // fsync, rename, fsync of the directory

 private:
  [[noreturn]] void fail(const char* what) const;

  std::string path_;
  std::string temporary_path_;
  int fd_ = -1;
};

// Makes the names in a directory durable (after creations, renames, removals).
void sync_directory(const std::string& directory);

// Writes a text file that way (config.json, manifests).
void write_text_file(const std::string& path, const std::string& text);
std::string read_text_file(const std::string& path);  // InvalidArgument when it is missing or unreadable

}  // namespace coterie
