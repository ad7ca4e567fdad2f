#include "base/memory.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

#include "coterie/error.h"

namespace coterie {
namespace {

TEST(AlignedBuffer, Alignment) {
  const AlignedBuffer small(100), large(size_t{5} << 20), empty;
  EXPECT_EQ(reinterpret_cast<uintptr_t>(small.data()) % 64, 0u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large.data()) % (size_t{2} << 20), 0u);
  EXPECT_EQ(large.size(), size_t{5} << 20);
  EXPECT_EQ(AlignedBuffer::footprint(100), 128u);
  EXPECT_EQ(AlignedBuffer::footprint(large.size()), size_t{6} << 20);
  EXPECT_EQ(empty.data(), nullptr);
}

TEST(ProvidePages, KeepsWhatIsThere) {
  AlignedBuffer buffer(size_t{4} << 20);
  buffer.as<char>()[5000] = 7;
  provide_pages(buffer.as<char>() + 100, (size_t{4} << 20) - 200);
  provide_pages(buffer.data(), 10);  // less than a page
  EXPECT_EQ(buffer.as<char>()[5000], 7);
}

TEST(AlignedBuffer, ReserveGrowsOnly) {
  AlignedBuffer buffer(64);
  std::memset(buffer.data(), 7, 64);
  void* const before = buffer.data();
  buffer.reserve(32);
  EXPECT_EQ(buffer.data(), before);
  EXPECT_EQ(buffer.as<char>()[63], 7);
  buffer.reserve(4096);
  EXPECT_EQ(buffer.size(), 4096u);
  buffer.as<char>()[4095] = 1;
}

TEST(AlignedBuffer, Moves) {
  AlignedBuffer a(64);
  void* const data = a.data();
  AlignedBuffer b(std::move(a));
  EXPECT_EQ(b.data(), data);
  AlignedBuffer c;
  c = std::move(b);
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(c.size(), 64u);
}

TEST(AlignedBuffer, BorrowsWithoutFreeing) {
  AlignedBuffer owner(64);
  {
    AlignedBuffer guest = AlignedBuffer::borrowed(owner.data(), 64);
    guest.reserve(64);
    EXPECT_EQ(guest.data(), owner.data());
    EXPECT_THROW(guest.reserve(128), std::logic_error);  // what is written would be lost to the owner
    const AlignedBuffer moved = AlignedBuffer::borrowed(owner.data(), 64);
  }
  owner.as<char>()[63] = 1;  // a sanitizer sees it if it was freed
}

TEST(AlignedBuffer, SaysWhenThereIsNoMemory) { EXPECT_THROW(AlignedBuffer(size_t{1} << 60), ResourceExhausted); }

TEST(MappedFile, ReadsBytes) {
  const std::string path = testing::TempDir() + "coterie_mapped_file_test";
  std::ofstream(path) << "few chosen";
  {
    MappedFile file(path);
    ASSERT_EQ(file.bytes().size(), 10u);
    EXPECT_EQ(std::memcmp(file.bytes().data(), "few chosen", 10), 0);
    const MappedFile moved(std::move(file));
    EXPECT_EQ(moved.bytes().size(), 10u);
    EXPECT_EQ(moved.path(), path);
  }
  std::ofstream(path, std::ios::trunc);
  EXPECT_TRUE(MappedFile(path).bytes().empty());
  std::remove(path.c_str());
}

TEST(MappedFile, NamesTheFileItCannotRead) {
  try {
    MappedFile("/no/such/file");
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "/no/such/file: No such file or directory");
  }
  EXPECT_THROW(MappedFile(std::filesystem::temp_directory_path().string()), InvalidArgument);
}

}  // namespace
}  // namespace coterie
