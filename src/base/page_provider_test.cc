#include "base/page_provider.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

namespace coterie {
namespace {

// That nobody has touched: what malloc gives may have been used before.
struct FreshMemory {
  size_t size;
  char* data;

  explicit FreshMemory(size_t bytes)
      : size(bytes),
        data(static_cast<char*>(
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1, 0))) {}
  ~FreshMemory() { munmap(data, size); }
  FreshMemory(const FreshMemory&) = delete;
  FreshMemory& operator=(const FreshMemory&) = delete;

  std::span<std::byte> bytes() { return {reinterpret_cast<std::byte*>(data), size}; }
  bool is_resident() const {
    std::vector<unsigned char> pages(size / static_cast<size_t>(sysconf(_SC_PAGESIZE)));
    return mincore(data, size, pages.data()) == 0 &&
           std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
  }
  bool becomes_resident() const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (!is_resident() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    return is_resident();
  }
};

constexpr size_t kBytes = (size_t{4} << 20) + 8192;  // not a whole number of pieces

bool has_hint() {
  const FreshMemory memory(kBytes);
  return madvise(memory.data, kBytes, MADV_POPULATE_WRITE) == 0;
}

TEST(PageProvider, ProvidesAllAndKeepsWhatIsWrittenMeanwhile) {
  if (!has_hint()) GTEST_SKIP() << "the system cannot be asked for pages";
  FreshMemory first(kBytes), second(kBytes);
  ASSERT_FALSE(first.is_resident());
  PageProvider provider;
  provider.provide(first.bytes());
  provider.provide(second.bytes());
  second.data[5000] = 7;
  EXPECT_TRUE(first.becomes_resident() && second.becomes_resident());
  EXPECT_EQ(second.data[5000], 7);
}

TEST(PageProvider, RestsWhilePaused) {
  if (!has_hint()) GTEST_SKIP() << "the system cannot be asked for pages";
  FreshMemory memory(kBytes);
  PageProvider provider;
  const auto rest = [] { std::this_thread::sleep_for(std::chrono::milliseconds(50)); };
  provider.pause();
  provider.provide(memory.bytes());
  rest();
  EXPECT_FALSE(memory.is_resident());
  provider.resume();
  provider.pause();  // within a moment
  rest();
  EXPECT_FALSE(memory.is_resident());
  provider.resume();
  EXPECT_TRUE(memory.becomes_resident());
}

TEST(PageProvider, StopsWithWorkLeft) {
  FreshMemory memory(size_t{64} << 20);
  PageProvider provider;
  provider.provide(memory.bytes());
}

}  // namespace
}  // namespace coterie
