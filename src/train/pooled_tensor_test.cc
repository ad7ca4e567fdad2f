#include "train/pooled_tensor.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace coterie {
namespace {

constexpr int64_t kElements = (int64_t{3} << 20) / 4;  // 3 MiB of fp32: two huge pages

TEST(PooledTensor, MemoryIsUsedAgain) {
  release_pooled_memory();
  const void* first = nullptr;
  {
    const at::Tensor x = pooled_empty({3, kElements / 3}, at::kFloat);
    EXPECT_EQ(x.sizes(), (std::vector<int64_t>{3, kElements / 3}));
    EXPECT_TRUE(x.is_contiguous());
    first = x.const_data_ptr();
    const at::Tensor view = x.narrow(0, 1, 1);
    EXPECT_EQ(pooled_bytes(), 0u);
  }
  EXPECT_EQ(pooled_bytes(), size_t{4} << 20);
  const at::Tensor y = pooled_empty({2 * kElements}, at::kBFloat16);
  EXPECT_EQ(y.const_data_ptr(), first);
  EXPECT_EQ(pooled_bytes(), 0u);
}

TEST(PooledTensor, WaitingMemoryIsBounded) {
  release_pooled_memory();
  for (int64_t n = 1; n <= 8; ++n) pooled_empty({n * kElements}, at::kFloat);
  EXPECT_LE(pooled_bytes(), size_t{24} << 20);  // the largest that was in use
  release_pooled_memory();
  EXPECT_EQ(pooled_bytes(), 0u);
}

// Another model's sizes don't keep those of the present one out of the pool.
TEST(PooledTensor, OldSizesMakeRoom) {
  release_pooled_memory();
  pooled_empty({2 * kElements}, at::kFloat);  // 6 MiB: 9 may wait
  const void* first = nullptr;
  {
    const at::Tensor x = pooled_empty({kElements}, at::kFloat);
    first = x.const_data_ptr();
  }
  EXPECT_EQ(pooled_empty({kElements}, at::kFloat).const_data_ptr(), first);
  EXPECT_EQ(pooled_bytes(), size_t{4} << 20);  // the old one is gone
}

TEST(PooledTensor, SomewhatLargerMemoryFits) {
  release_pooled_memory();
  const void* first = nullptr;
  {
    const at::Tensor x = pooled_empty({5 * kElements}, at::kFloat);
    first = x.const_data_ptr();
  }
  EXPECT_EQ(pooled_empty({4 * kElements + 1}, at::kFloat).const_data_ptr(), first);  // 16 MiB for 14
  EXPECT_NE(pooled_empty({2 * kElements}, at::kFloat).const_data_ptr(), first);
}

TEST(PooledTensor, SmallAndEmptyOnesWork) {
  EXPECT_EQ(pooled_empty({0, 5}, at::kFloat).numel(), 0);
  EXPECT_EQ(pooled_empty({7}, at::kLong).scalar_type(), at::kLong);
}

}  // namespace
}  // namespace coterie
