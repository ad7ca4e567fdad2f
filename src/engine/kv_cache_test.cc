#include "engine/kv_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <set>

#include "coterie/error.h"
#include "model/test_model.h"

namespace coterie {
namespace {

constexpr int64_t kBlockSize = 16;

TEST(KvCache, BlocksDoNotOverlapAndReturnToThePool) {
  const ModelConfig config = small_config();
  const int64_t layer_bytes =
      KvBlock(DType::kBF16, kBlockSize, config.num_kv_heads, config.head_dim, config.head_dim).bytes();
  constexpr int kBlocks = 150;  // more than two slabs
  KvCache cache(config, DType::kBF16, kBlockSize, kBlocks);
  cache.provide_memory();
  std::vector<int32_t> blocks;
  for (int i = 0; i < kBlocks; ++i) blocks.push_back(cache.allocate());
  EXPECT_EQ(std::set<int32_t>(blocks.begin(), blocks.end()).size(), size_t{kBlocks});
  EXPECT_EQ(cache.num_free(), 0);
  EXPECT_THROW(cache.allocate(), ResourceExhausted);

  // Every layer of every block is filled with its own number; none is overwritten by another.
  unsigned char mark = 0;
  for (const int32_t block : blocks) {
    for (int64_t layer = 0; layer < config.num_layers(); ++layer) {
      std::memset(cache.data(block, layer), mark++, layer_bytes);
    }
  }
  mark = 0;
  const auto intact = [&](const void* data, unsigned char value) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    return std::all_of(bytes, bytes + layer_bytes, [&](unsigned char byte) { return byte == value; });
  };
  for (const int32_t block : blocks) {
    for (int64_t layer = 0; layer < config.num_layers(); ++layer) {
      ASSERT_TRUE(intact(cache.data(block, layer), mark++));
    }
  }

  cache.release(blocks[5]);
  EXPECT_EQ(cache.num_free(), 1);
  EXPECT_EQ(cache.allocate(), blocks[5]);
}

TEST(KvCache, TableGivesBackItsEnd) {
  KvCache cache(small_config(), DType::kF32, kBlockSize, 4);
  BlockTable table(cache);
  table.reserve(4 * kBlockSize);
  const int32_t second = table.block(1);
  table.trim(kBlockSize + 1);
  EXPECT_EQ(table.num_blocks(), 2);
  EXPECT_EQ(cache.num_free(), 2);
  table.trim(3 * kBlockSize);  // nothing to give
  EXPECT_EQ(table.num_blocks(), 2);
  table.reserve(3 * kBlockSize);
  EXPECT_EQ(table.block(1), second);
  EXPECT_EQ(table.layers()[1].blocks[2], cache.data(table.block(2), 1));
}

TEST(KvCache, TableGrowsByBlocksAndGivesThemBack) {
  const ModelConfig config = small_config();
  KvCache cache(config, DType::kF32, kBlockSize, 4);
  {
    BlockTable table(cache);
    table.reserve(1);
    EXPECT_EQ(table.num_blocks(), 1);
    void* first = table.layers()[2].blocks[0];
    table.reserve(kBlockSize);
    EXPECT_EQ(table.num_blocks(), 1);
    table.reserve(kBlockSize + 1);
    EXPECT_EQ(table.num_blocks(), 2);
    EXPECT_EQ(table.layers()[2].blocks[0], first);  // what it holds stays where it is
    EXPECT_EQ(static_cast<int64_t>(table.layers().size()), config.num_layers());
    EXPECT_THROW(table.reserve(5 * kBlockSize), ResourceExhausted);
  }
  EXPECT_EQ(cache.num_free(), 4);
}

std::vector<int32_t> block_tokens(int32_t from) {
  std::vector<int32_t> tokens(kBlockSize);
  for (int32_t i = 0; i < kBlockSize; ++i) tokens[i] = from + i;
  return tokens;
}

TEST(KvCache, PublishedBlocksAreFoundBehindTheirOwnPrefixOnly) {
  KvCache cache(small_config(), DType::kF32, kBlockSize, 4);
  const auto a = block_tokens(0), b = block_tokens(5);
  const int32_t first = cache.allocate(), second = cache.allocate();
  const KvCache::Prefix after_a = cache.publish(KvCache::kEmptyPrefix, a, first);
  const KvCache::Prefix after_ab = cache.publish(after_a, b, second);
  EXPECT_NE(after_a, after_ab);
  EXPECT_FALSE(cache.find(KvCache::kEmptyPrefix, b));
  EXPECT_FALSE(cache.find(after_a, a));
  const auto found = cache.find(after_a, b);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->block, second);
  EXPECT_EQ(found->prefix, after_ab);
  // The same contents in another block have the same name, and the first one stays the known one.
  const int32_t twin = cache.allocate();
  EXPECT_EQ(cache.publish(KvCache::kEmptyPrefix, a, twin), after_a);
  cache.release(twin);
  EXPECT_EQ(cache.find(KvCache::kEmptyPrefix, a)->block, first);
  EXPECT_EQ(cache.num_free(), 2);
}

TEST(KvCache, ChainsOfTextsThatTurnAlikeHaveTheSameRoot) {
  const KvCache plain(small_config(), DType::kF32, kBlockSize, 4),
      dynamic(windowed_config(), DType::kF32, kBlockSize, 4), longrope(longrope_config(), DType::kF32, kBlockSize, 4);
  EXPECT_EQ(plain.root(90), KvCache::kEmptyPrefix);
  EXPECT_EQ(plain.longest_alike(20), std::numeric_limits<int64_t>::max());
  for (const KvCache* cache : {&dynamic, &longrope}) {
    EXPECT_EQ(cache->root(1), KvCache::kEmptyPrefix);
    EXPECT_EQ(cache->root(48), KvCache::kEmptyPrefix);  // the original context
    EXPECT_NE(cache->root(49), KvCache::kEmptyPrefix);
  }
  EXPECT_NE(dynamic.root(49), dynamic.root(50));
  EXPECT_EQ(longrope.root(49), longrope.root(90));
  EXPECT_EQ(longrope.longest_alike(48), 48);
  EXPECT_EQ(longrope.longest_alike(49), std::numeric_limits<int64_t>::max());
}

TEST(KvCache, TheLeastRecentlyUsedBlockIsForgottenFirst) {
  KvCache cache(small_config(), DType::kF32, kBlockSize, 3);
  std::vector<int32_t> blocks;
  for (int32_t i = 0; i < 3; ++i) {
    blocks.push_back(cache.allocate());
    cache.publish(KvCache::kEmptyPrefix, block_tokens(i), blocks[i]);
  }
  for (const int32_t block : {blocks[1], blocks[0], blocks[2]}) cache.release(block);
  EXPECT_EQ(cache.num_free(), 3);
  cache.release(cache.find(KvCache::kEmptyPrefix, block_tokens(1))->block);  // now the most recently used
  EXPECT_EQ(cache.allocate(), blocks[0]);
  EXPECT_FALSE(cache.find(KvCache::kEmptyPrefix, block_tokens(0)));
  EXPECT_EQ(cache.allocate(), blocks[2]);
  EXPECT_EQ(cache.find(KvCache::kEmptyPrefix, block_tokens(1))->block, blocks[1]);
  EXPECT_THROW(cache.allocate(), ResourceExhausted);
}

TEST(KvCache, ForgetsAtOnceWhenToldTo) {
  KvCache cache(small_config(), DType::kF32, kBlockSize, 2, false);
  const int32_t block = cache.allocate();
  cache.publish(KvCache::kEmptyPrefix, block_tokens(0), block);
  EXPECT_EQ(cache.find(KvCache::kEmptyPrefix, block_tokens(0))->block, block);  // while it is held
  cache.release(block);
  cache.release(block);
  EXPECT_FALSE(cache.find(KvCache::kEmptyPrefix, block_tokens(0)));
  EXPECT_EQ(cache.num_free(), 2);
}

}  // namespace
}  // namespace coterie
