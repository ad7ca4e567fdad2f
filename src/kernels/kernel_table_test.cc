#include "kernels/kernel_table.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "coterie/error.h"

namespace coterie {
namespace {

TEST(KernelTable, BestIsFirstAndGenericIsLast) {
  ASSERT_FALSE(supported_kernels().empty());
  EXPECT_EQ(supported_kernels().back()->name, "generic");
  if (!std::getenv("COTERIE_ISA")) {
    EXPECT_EQ(active_kernels().name, supported_kernels().front()->name);
  }
}

TEST(KernelTable, ScopedKernelsAreUndone) {
  const std::string_view before = active_kernels().name;
  for (const KernelTable* table : supported_kernels()) {
    const ScopedKernels scope(*table);
    EXPECT_EQ(active_kernels().name, table->name);
  }
  EXPECT_EQ(active_kernels().name, before);
}

// Not a test of its own: says in a fresh process which table COTERIE_ISA gave.
TEST(KernelTable, DISABLED_Report) {
  try {
    std::printf("active=%s\n", std::string(active_kernels().name).c_str());
  } catch (const InvalidArgument& error) {
    std::printf("active=%s\n", error.what());
  }
}

std::string active_in_fresh_process(const std::string& isa) {
  // The choice is made once a process, so every forced name needs a process of its own.
  const std::string command = "COTERIE_ISA=" + isa + " COTERIE_LOG=1 /proc/" + std::to_string(getpid()) +
                              "/exe --gtest_also_run_disabled_tests --gtest_filter=KernelTable.DISABLED_Report 2>&1";
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) output += static_cast<char>(c);
  pclose(pipe);
  const size_t start = output.find("active=") + 7;
  return output.find("active=") == std::string::npos ? output : output.substr(start, output.find('\n', start) - start);
}

TEST(KernelTable, EnvironmentForcesTheIsa) {
  for (const KernelTable* table : supported_kernels()) {
    EXPECT_EQ(active_in_fresh_process(std::string(table->name)), table->name);
  }
  EXPECT_EQ(active_in_fresh_process("''"), supported_kernels().front()->name);
  EXPECT_EQ(active_in_fresh_process("neon"),
            "COTERIE_ISA: 'neon' is not one of amx, avx2, avx512, avx512_bf16, generic");
}

}  // namespace
}  // namespace coterie
