#include "kernels/limits.h"

#include <gtest/gtest.h>

#include "kernels/kernel_table.h"

namespace coterie {
namespace {

// A neighbour may take most of the machine, so the bounds are wide: those of any CPU.
TEST(Limits, AreRatesThatACpuCanHave) {
  NativeThreadPool pool(1);
  for (const KernelTable* table : supported_kernels()) {
    const ScopedKernels scope(*table);
    for (DType type : {DType::kF32, DType::kBF16}) {
      const double flops = register_flops(type, pool);
      EXPECT_GT(flops, 1e7) << table->name;
      // No more than one step a cycle of 10 GHz.
      EXPECT_LT(flops, 1e10 * static_cast<double>(table->peak_flops(type))) << table->name;
    }
  }
}

TEST(Limits, ReadsTheWholeMemory) {
  NativeThreadPool one(1), two(2);
  ReadBandwidth memory(size_t{8} << 20);
  for (ThreadPool* pool : {static_cast<ThreadPool*>(&one), static_cast<ThreadPool*>(&two)}) {
    const double rate = memory.measure(*pool);
    EXPECT_GT(rate, 1e7);
    EXPECT_LT(rate, 1e13);
  }
}

}  // namespace
}  // namespace coterie
