// Which panels are kept, and for how long. That products of them have the same bits is tests/test_torch_ops.py's.
#include "train/packed_weights.h"

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "kernels/kernel_table.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

constexpr size_t kPlenty = size_t{1} << 30;

class PackedWeightsTest : public testing::Test {
 protected:
  void SetUp() override {
    at::manual_seed(1);
    keep_packed_weights(kPlenty);
  }
  void TearDown() override { keep_packed_weights(0); }
};

at::Tensor used_once(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  at::Tensor weight = at::randn(sizes).to(dtype);
  EXPECT_EQ(packed_weight(weight), nullptr);
  return weight;
}

TEST_F(PackedWeightsTest, FromTheSecondUseOnUntilAChange) {
  at::Tensor weight = used_once({3, 5, 7});
  const auto panels = packed_weight(weight);
  ASSERT_NE(panels, nullptr);
  EXPECT_EQ(panels->bytes(), packed_weight_bytes());
  EXPECT_EQ(packed_weight(weight), panels);
  EXPECT_EQ(packed_weight(weight.detach()), panels);  // the same memory, counted together
  for (int64_t e = 0; e < 3; ++e) {
    const PackedMatrix expected(const_matrix(weight, e), torch_pool());
    EXPECT_EQ(std::memcmp(panels->matrices()[e].data(), expected.data(), expected.bytes()), 0);
  }
  weight.mul_(2);
  EXPECT_EQ(packed_weight(weight), nullptr);
  EXPECT_EQ(packed_weight_bytes(), 0u);
  const auto changed = packed_weight(weight);
  ASSERT_NE(changed, nullptr);
  EXPECT_NE(std::memcmp(changed->matrices()[0].data(), panels->matrices()[0].data(), panels->matrices()[0].bytes()), 0);
}

TEST_F(PackedWeightsTest, ViewsAreWeightsOfTheirOwn) {
  const at::Tensor weight = used_once({4, 6}), transposed = weight.t();
  const auto panels = packed_weight(weight);
  ASSERT_NE(panels, nullptr);
  EXPECT_EQ(packed_weight(transposed), nullptr);
  const auto of_transposed = packed_weight(transposed);
  ASSERT_NE(of_transposed, nullptr);
  EXPECT_EQ(of_transposed->matrices()->rows(), 6);
  EXPECT_EQ(packed_weight(weight, /*gated=*/true), nullptr);
  EXPECT_TRUE(packed_weight(weight, true)->matrices()->gated());
  const at::Tensor halves = weight.view(at::kBFloat16).as_strided({4, 6}, {6, 1});
  EXPECT_EQ(packed_weight(halves), nullptr);
  EXPECT_EQ(packed_weight(halves)->matrices()->type(), PanelType::kBF16);
  EXPECT_EQ(packed_weight(weight), panels);  // still
}

TEST_F(PackedWeightsTest, NothingToPack) {
  const at::Tensor weight = at::empty({0, 6});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(packed_weight(weight), nullptr);
}

TEST_F(PackedWeightsTest, AnotherTensorAtTheSameAddress) {
  std::vector<float> memory(30, 1.0f);
  at::Tensor first = at::from_blob(memory.data(), {5, 6});
  packed_weight(first);
  EXPECT_NE(packed_weight(first), nullptr);
  first = at::Tensor();
  std::fill(memory.begin(), memory.end(), 2.0f);
  const at::Tensor second = at::from_blob(memory.data(), {5, 6});
  EXPECT_EQ(packed_weight(second), nullptr);
  const auto panels = packed_weight(second);
  ASSERT_NE(panels, nullptr);
  EXPECT_EQ(*static_cast<const float*>(panels->matrices()->data()), 2.0f);
}

TEST_F(PackedWeightsTest, DeadTensorsAreForgotten) {
  {
    const at::Tensor weight = used_once({64, 64});
    packed_weight(weight);
    EXPECT_GT(packed_weight_bytes(), 0u);
  }
  const at::Tensor other = used_once({2, 3});
  EXPECT_EQ(packed_weight_bytes(), 0u);
}

// Those that were all met before the dead ones died find room too, and so do others where one has moved.
TEST_F(PackedWeightsTest, TheDeadMakeRoom) {
  at::Tensor first = at::randn({64, 64});
  keep_packed_weights(WeightPanels::most_bytes(first, false));
  packed_weight(first);
  const at::Tensor second = used_once({64, 64}), third = used_once({64, 64});
  EXPECT_NE(packed_weight(first), nullptr);
  EXPECT_EQ(packed_weight(second), nullptr);
  first = at::Tensor();
  EXPECT_NE(packed_weight(second), nullptr);
  second.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(c10::GetCPUAllocator()->allocate(64 * 64 * 4));
  EXPECT_NE(packed_weight(third), nullptr);
}

TEST_F(PackedWeightsTest, NoMoreThanTheBound) {
  const at::Tensor a = used_once({64, 64}), b = used_once({64, 64});
  const size_t one = WeightPanels::most_bytes(a, false);
  keep_packed_weights(2 * one - 1);
  EXPECT_NE(packed_weight(a), nullptr);
  EXPECT_EQ(packed_weight(b), nullptr);
  EXPECT_EQ(packed_weight_bytes(), one);
  EXPECT_NE(packed_weight(a), nullptr);
  keep_packed_weights(2 * one);
  EXPECT_NE(packed_weight(b), nullptr);
  const auto in_use = packed_weight(a);
  keep_packed_weights(0);
  EXPECT_EQ(packed_weight_bytes(), 0u);
  EXPECT_EQ(packed_weight(a), nullptr);
  EXPECT_EQ(in_use->matrices()->rows(), 64);  // its user keeps it
}

TEST_F(PackedWeightsTest, Bf16IsCompactWhereItCanBe) {
  const at::Tensor weight = used_once({2, 64, 64}, at::kBFloat16);
  const auto panels = packed_weight(weight);
  ASSERT_NE(panels, nullptr);
  EXPECT_EQ(panels->matrices()[1].shape().compact, active_kernels().compact_pays);
  // Most elements are too small for codes that go up to the first one.
  at::Tensor wild = at::full({1, 64, 64}, 1e-9).to(at::kBFloat16);
  wild.select(2, 0).fill_(1);
  packed_weight(wild);
  const auto of_wild = packed_weight(wild);
  ASSERT_NE(of_wild, nullptr);
  EXPECT_FALSE(of_wild->matrices()->shape().compact);
  EXPECT_EQ(of_wild->bytes(), 64u * 64 * 2);
}

TEST_F(PackedWeightsTest, TensorsOfInferenceModeCountNoChanges) {
  const c10::InferenceMode mode;
  const at::Tensor weight = at::randn({4, 4});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(packed_weight(weight), nullptr);
}

TEST_F(PackedWeightsTest, FromSeveralThreads) {
  const at::Tensor weight = used_once({8, 64, 64});
  std::vector<std::shared_ptr<const WeightPanels>> found(4);
  std::vector<std::thread> threads;
  for (auto& panels : found) threads.emplace_back([&] { panels = packed_weight(weight); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& panels : found) EXPECT_EQ(panels, found[0]);
  EXPECT_NE(found[0], nullptr);
}

}  // namespace
}  // namespace coterie
