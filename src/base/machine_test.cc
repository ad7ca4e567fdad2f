#include "base/machine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace coterie {
namespace {

namespace fs = std::filesystem;

class MachineTest : public testing::Test {
 protected:
  void SetUp() override {
    group_ = fs::path(testing::TempDir()) / ("group_" + std::to_string(getpid()));
    fs::create_directories(group_ / "cpu");
    fs::create_directories(group_ / "memory");
  }
  void TearDown() override { fs::remove_all(group_); }
  void write(const std::string& name, const std::string& text) { std::ofstream(group_ / name) << text; }

  fs::path group_;
};

TEST_F(MachineTest, WithoutLimitsAllOfIt) {
  const int cpus = available_cpus("/nowhere");
  const int64_t memory = available_memory("/nowhere");
  EXPECT_GE(cpus, 1);
  EXPECT_GT(memory, int64_t{1} << 28);
  write("cpu.max", "max 100000\n");
  write("memory.max", "max\n");
  write("cpu/cpu.cfs_quota_us", "-1\n");
  write("memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(available_cpus(group_), cpus);
  EXPECT_EQ(available_memory(group_), memory);
}

TEST_F(MachineTest, LimitsOfAContainer) {
  write("cpu.max", "50000 100000\n");
  write("memory.max", "104857600\n");
  EXPECT_EQ(available_cpus(group_), 1);
  EXPECT_EQ(available_memory(group_), 100 << 20);
}

TEST_F(MachineTest, UnusedMemory) {
  const int64_t unused = unused_memory("/nowhere");
  EXPECT_GT(unused, int64_t{1} << 24);
  EXPECT_LT(unused, available_memory("/nowhere"));
  write("memory.max", "104857600\n");
  write("memory.current", "94371840\n");
  write("memory.stat", "anon 1\ninactive_file 20971520\nactive_file 3\n");
  EXPECT_EQ(unused_memory(group_), 30 << 20);  // 10 MiB, and 20 that caches of files use
  write("memory.current", "209715200\n");
  EXPECT_EQ(unused_memory(group_), 0);
}

TEST_F(MachineTest, LimitsOfVersion1) {
  write("cpu/cpu.cfs_quota_us", "90000\n");
  write("cpu/cpu.cfs_period_us", "100000\n");
  write("memory/memory.limit_in_bytes", "104857600\n");
  EXPECT_EQ(available_cpus(group_), 1);
  EXPECT_EQ(available_memory(group_), 100 << 20);
  write("memory/memory.usage_in_bytes", "94371840\n");
  write("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 20971520\n");
  EXPECT_EQ(unused_memory(group_), 30 << 20);
}

}  // namespace
}  // namespace coterie
