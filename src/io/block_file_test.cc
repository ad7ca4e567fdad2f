#include "io/block_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "io/atomic_file.h"
#include "io/test_files.h"

namespace coterie {
namespace {

class BlockFileTest : public TemporaryDirectoryTest {};

std::vector<int> numbers(int count, int first) {
  std::vector<int> v(count);
  std::iota(v.begin(), v.end(), first);
  return v;
}

void write_two(const std::string& path) {
  BlockFileWriter writer(path);
  const std::vector<int> a = numbers(50, 5), b = numbers(3, 9);
  writer.add("a", a.data(), a.size() * sizeof(int));
  writer.add("b", b.data(), b.size() * sizeof(int));
  writer.add("empty", nullptr, 0);
  writer.commit("numbers");
}

void expect_two(const BlockFile& file) {
  const AlignedBuffer a = file.find("a"), b = file.find("b");
  const std::vector<int> expected = numbers(50, 5);
  ASSERT_EQ(a.size(), 200u);
  EXPECT_EQ(std::memcmp(a.data(), expected.data(), 200), 0);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b.data()) % 64, 0u);
  EXPECT_EQ(b.as<int>()[2], 11);
  EXPECT_EQ(file.find("empty").size(), 0u);
  EXPECT_EQ(file.find("c").data(), nullptr);
}

TEST_F(BlockFileTest, GivesBackWhatWasWritten) {
  const std::string path = (directory() / "x.blocks").string();
  write_two(path);
  NativeThreadPool pool(2);
  auto file = BlockFile::open(path, "numbers");
  ASSERT_TRUE(file && file->verify(pool));
  expect_two(*file);
  EXPECT_EQ(file->copy(/*stop=*/true).data(), nullptr);
  file->use(file->copy(/*stop=*/false));
  expect_two(*file);
}

TEST_F(BlockFileTest, IsNotThereWhenItIsAnotherOrDamaged) {
  const std::string path = (directory() / "x.blocks").string();
  NativeThreadPool pool(2);
  EXPECT_FALSE(BlockFile::open(path, "numbers"));
  write_two(path);
  EXPECT_FALSE(BlockFile::open(path, "letters"));
  const std::string whole = read_text_file(path);
  const auto is_padding = [](size_t at) {
    return (at >= 8 && at < 64) || (at >= 64 + 200 && at < 320) || (at >= 320 + 12 && at < 384);
  };
  for (size_t at = 0; at < whole.size(); ++at) {
    if (is_padding(at)) continue;
    std::string damaged = whole;
    damaged[at] ^= 0x20;
    std::ofstream(path, std::ios::binary) << damaged;
    auto file = BlockFile::open(path, "numbers");
    ASSERT_FALSE(file && file->verify(pool)) << at;
  }
  for (const size_t size : {size_t{0}, size_t{7}, size_t{20}, whole.size() - 1}) {
    std::ofstream(path, std::ios::binary) << whole.substr(0, size);
    EXPECT_FALSE(BlockFile::open(path, "numbers")) << size;
  }
}

TEST_F(BlockFileTest, LeavesNothingWhenItIsNotCommitted) {
  {
    BlockFileWriter((directory() / "x.blocks").string()).add("a", "abc", 3);
  }
  EXPECT_FALSE(BlockFile::open((directory() / "x.blocks").string(), ""));
  EXPECT_TRUE(std::filesystem::is_empty(directory()));
}

}  // namespace
}  // namespace coterie
