#include "engine/kv_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "coterie/error.h"
#include "model/test_model.h"

namespace coterie {
namespace {

TEST(KvCache, BlocksDoNotOverlapAndReturnToThePool) {
  const ModelConfig config = small_config();
  const int64_t part_bytes = config.num_kv_heads * KvCache::kBlockSize * config.head_dim * 2;
  KvCache cache(config, DType::kBF16, 70);  // more than two slabs
  std::vector<int32_t> blocks;
  for (int i = 0; i < 70; ++i) blocks.push_back(cache.allocate());
  EXPECT_EQ(std::set<int32_t>(blocks.begin(), blocks.end()).size(), 70u);
  EXPECT_EQ(cache.num_free(), 0);
  EXPECT_THROW(cache.allocate(), ResourceExhausted);

  // Every part of every block is filled with its own number; none is overwritten by another.
  unsigned char mark = 0;
  for (const int32_t block : blocks) {
    for (int64_t layer = 0; layer < config.num_layers(); ++layer) {
      std::memset(cache.keys(block, layer), mark++, part_bytes);
      std::memset(cache.values(block, layer), mark++, part_bytes);
    }
  }
  mark = 0;
  const auto intact = [&](const void* part, unsigned char value) {
    const auto* bytes = static_cast<const unsigned char*>(part);
    return std::all_of(bytes, bytes + part_bytes, [&](unsigned char byte) { return byte == value; });
  };
  for (const int32_t block : blocks) {
    for (int64_t layer = 0; layer < config.num_layers(); ++layer) {
      ASSERT_TRUE(intact(cache.keys(block, layer), mark++));
      ASSERT_TRUE(intact(cache.values(block, layer), mark++));
    }
  }

  cache.release(blocks[5]);
  EXPECT_EQ(cache.num_free(), 1);
  EXPECT_EQ(cache.allocate(), blocks[5]);
}

TEST(KvCache, TableGrowsByBlocksAndGivesThemBack) {
  const ModelConfig config = small_config();
  KvCache cache(config, DType::kF32, 4);
  {
    BlockTable table(cache);
    table.reserve(1);
    EXPECT_EQ(table.num_blocks(), 1);
    void* first = table.layers()[2].k_blocks[0];
    table.reserve(KvCache::kBlockSize);
    EXPECT_EQ(table.num_blocks(), 1);
    table.reserve(KvCache::kBlockSize + 1);
    EXPECT_EQ(table.num_blocks(), 2);
    EXPECT_EQ(table.layers()[2].k_blocks[0], first);  // what it holds stays where it is
    EXPECT_EQ(static_cast<int64_t>(table.layers().size()), config.num_layers());
    EXPECT_THROW(table.reserve(5 * KvCache::kBlockSize), ResourceExhausted);
  }
  EXPECT_EQ(cache.num_free(), 4);
}

}  // namespace
}  // namespace coterie
