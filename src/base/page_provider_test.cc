#include "base/page_provider.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "base/memory.h"

namespace coterie {
namespace {

constexpr size_t kBytes = (size_t{4} << 20) + 8192;  // not a whole number of pieces

bool is_resident(AlignedBuffer& buffer) {
  std::vector<unsigned char> pages(buffer.size() / static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  return mincore(buffer.data(), buffer.size(), pages.data()) == 0 &&
         std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
}

std::span<std::byte> all_of(AlignedBuffer& buffer) { return {buffer.as<std::byte>(), buffer.size()}; }

TEST(PageProvider, ProvidesAllAndKeepsWhatIsWrittenMeanwhile) {
  AlignedBuffer probe(kBytes), first(kBytes), second(kBytes);
  if (madvise(probe.data(), kBytes, MADV_POPULATE_WRITE) != 0) GTEST_SKIP() << "the system has no such hint";
  ASSERT_FALSE(is_resident(first));
  PageProvider provider;
  provider.wait();  // for nothing
  provider.provide(all_of(first));
  provider.provide(all_of(second));
  second.as<char>()[5000] = 7;
  provider.wait();
  EXPECT_TRUE(is_resident(first) && is_resident(second));
  EXPECT_EQ(second.as<char>()[5000], 7);
}

TEST(PageProvider, RestsWhilePaused) {
  AlignedBuffer buffer(kBytes);
  PageProvider provider;
  provider.pause();
  provider.provide(all_of(buffer));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(is_resident(buffer));
  provider.resume();
  provider.pause();  // within a moment
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(is_resident(buffer));
  provider.resume();
  provider.wait();
}

TEST(PageProvider, StopsWithWorkLeft) {
  AlignedBuffer buffer(size_t{64} << 20);
  PageProvider provider;
  provider.provide(all_of(buffer));
}

}  // namespace
}  // namespace coterie
