// Attention of every ISA against doubles.
//
// Tolerance: a score is off by at most (d + 2) u scale sum|q k| =: s, so every weight by a factor of at most
// exp(2 s) (its own score and the sum's); the exponentials, corrections and the two sums over S keys add
// (2 S + 32) u. An output is a mean of values, hence off by at most that times the largest |v|. Beside a cache in bf16
// queries and weights are rounded to a relative w = 2^-9, which adds scale sum|q k| w to s, and w to a weight. Beside
// one of integers queries are off by r = max|q| / 65534, which adds scale d r max|k| to s; weights (times the values'
// factors) by max / 65534 in each of S keys.
#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/reference.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

struct Shape {
  int64_t S, H, G, d, block_size;
  DType dtype = DType::kF32;
  int64_t window = 0;
  bool sinks = false;
  int64_t values_in_keys = 0;  // their width; 0: values of their own
};

// The cache and the queries of a sequence. Unused cache rows are NaN: whoever reads them shows it.
struct Sequence {
  int64_t S;
  AttentionShape shape;
  std::vector<float> q, k, v, sinks_H;
  std::vector<std::vector<float>> memory;
  std::vector<void*> blocks;
  PagedKv kv;

  Sequence(const Shape& s, std::mt19937& random) : S(s.S) {
    const int64_t value_dim = s.values_in_keys ? s.values_in_keys : s.d;
    shape = {.H = s.H, .G = s.G, .d = s.d, .v = value_dim, .window = s.window};
    shape.scale = 1.0f / std::sqrt(static_cast<float>(s.d));
    q = random_floats(s.S * s.H * s.d, random);
    k = random_floats(s.S * s.G * s.d, random);
    v = random_floats(s.S * s.G * value_dim, random);
    if (s.sinks) {
      sinks_H = random_floats(s.H, random);
      shape.sinks_H = sinks_H.data();
    }
    const int64_t bytes = KvBlock(s.dtype, s.block_size, s.G, s.d, s.values_in_keys ? 0 : value_dim).bytes();
    memory.resize(static_cast<size_t>((s.S + s.block_size - 1) / s.block_size));
    for (auto& block : memory) {
      block.assign(static_cast<size_t>(bytes) / 4, std::numeric_limits<float>::quiet_NaN());
      blocks.push_back(block.data());
    }
    kv = {blocks.data(), s.dtype, s.block_size, s.values_in_keys == 0};
  }

  // Tokens [first, first + T) as one chunk of a prompt.
  std::vector<float> run_chunk(int64_t first, int64_t T, ThreadPool& pool) {
    const AttentionChunk chunk = {kv, 0, T, first + T};
    append_kv({&chunk, 1}, k.data() + first * shape.G * shape.d, v.data() + first * shape.G * shape.v, shape, pool);
    std::vector<float> out(static_cast<size_t>(T * shape.H * shape.v));
    attention({&chunk, 1}, q.data() + first * shape.H * shape.d, shape, out.data(), pool);
    return out;
  }

  // Nothing is in the cache but the first tokens.
  void forget_behind(int64_t first, ThreadPool& pool) {
    for (auto& block : memory) std::fill(block.begin(), block.end(), std::numeric_limits<float>::quiet_NaN());
    const AttentionChunk chunk = {kv, 0, first, first};
    append_kv({&chunk, 1}, k.data(), v.data(), shape, pool);
  }
};

double largest(const std::vector<float>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0,
                         [](double m, float x) { return std::max<double>(m, std::abs(x)); });
}

// The reference reads the cache as it is, so that its rounding does not count.
void check(const Shape& shape, ThreadPool& pool) {
  SCOPED_TRACE("S " + std::to_string(shape.S) + " H " + std::to_string(shape.H) + " G " + std::to_string(shape.G) +
               " d " + std::to_string(shape.d) + " block " + std::to_string(shape.block_size) + " window " +
               std::to_string(shape.window));
  std::mt19937 random(8);
  Sequence sequence(shape, random);
  const std::vector<float> out = sequence.run_chunk(0, shape.S, pool);
  std::vector<double> expected(out.size());
  reference::attention(sequence.q.data(), sequence.kv, shape.S, shape.S, sequence.shape, expected.data());
  const double d = static_cast<double>(shape.d), u = kUnitRoundoff;
  const double S = static_cast<double>(shape.S), integers = shape.dtype == DType::kI8 ? 1.0 / 65534 : 0;
  const double halves = shape.dtype == DType::kBF16 ? std::ldexp(1.0, -9) : 0;
  const double products = sequence.shape.scale * d * largest(sequence.q) * largest(sequence.k);
  const double score = ((d + 2) * u + halves + integers) * products;
  const double values = largest(shape.values_in_keys ? sequence.k : sequence.v);
  const double tolerance = (std::expm1(2 * score) + (2 * S + 32) * u + halves + S * integers) * values;
  for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], tolerance) << i;
}

TEST(Attention, AgreesWithDoubles) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
      check({1, 1, 1, 8, 16, dtype}, pool);
      check({5, 4, 4, 64, 16, dtype}, pool);
      check({33, 6, 2, 12, 4, dtype}, pool);
      check({129, 4, 1, 80, 16, dtype}, pool);
      check({150, 9, 3, 33, 7, dtype}, pool);
      check({70, 2, 2, 128, 32, dtype}, pool);
      check({70, 2, 2, 256, 64, dtype}, pool);
    }
  });
}

TEST(Attention, WindowsSinksAndValuesInKeys) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
      for (const int64_t window : {1, 7, 63, 64, 65, 200}) {
        check({150, 4, 2, 20, 16, dtype, window, /*sinks=*/false}, pool);
        check({150, 4, 2, 20, 16, dtype, window, /*sinks=*/true}, pool);
      }
      check({150, 4, 2, 20, 16, dtype, 0, /*sinks=*/true}, pool);
      check({90, 35, 1, 44, 16, dtype, 0, false, /*values_in_keys=*/36}, pool);  // more heads than a task has
      check({90, 4, 2, 44, 16, dtype, 17, true, /*values_in_keys=*/44}, pool);
    }
  });
}

// The same bits however the prompt is cut, and with any number of threads. Keys of 64 or 96 numbers in blocks of 16 or
// 32 are read where they lie by single tokens, and brought into scratch by many; others always are.
TEST(Attention, ChunksAndThreadsDoNotMatter) {
  NativeThreadPool one(1), two(2), three(3);
  for_each_isa([&] {
    for (const Shape& shape :
         {Shape{140, 6, 2, 40, 16}, Shape{140, 6, 2, 40, 16, DType::kBF16}, Shape{140, 6, 2, 40, 16, DType::kI8},
          Shape{140, 6, 2, 40, 16, DType::kF32, /*window=*/37, /*sinks=*/true},
          Shape{140, 34, 1, 40, 16, DType::kF32, 0, false, /*values_in_keys=*/24}, Shape{140, 6, 2, 64, 16},
          Shape{140, 6, 2, 64, 16, DType::kBF16}, Shape{140, 6, 2, 64, 16, DType::kI8}, Shape{140, 6, 2, 64, 8},
          Shape{140, 6, 6, 160, 32}, Shape{140, 6, 6, 160, 32, DType::kBF16}, Shape{140, 6, 6, 160, 32, DType::kI8},
          Shape{140, 6, 2, 64, 16, DType::kI8, /*window=*/37, /*sinks=*/true},
          Shape{140, 6, 2, 64, 16, DType::kBF16, /*window=*/64, /*sinks=*/true},
          Shape{140, 4, 1, 96, 16, DType::kBF16, 0, false, /*values_in_keys=*/32},
          Shape{140, 4, 1, 96, 16, DType::kI8, 0, false, /*values_in_keys=*/32}}) {
      std::mt19937 random(9);
      Sequence whole(shape, random);
      const std::vector<float> expected = whole.run_chunk(0, shape.S, one);
      EXPECT_EQ(whole.run_chunk(0, shape.S, two), expected);
      random.seed(9);
      Sequence cut(shape, random);
      std::vector<float> joined;
      int64_t first = 0;
      for (int64_t T : {1, 63, 1, 2, 64, 1, 7, 1}) {
        const std::vector<float> out = cut.run_chunk(first, T, three);
        joined.insert(joined.end(), out.begin(), out.end());
        first += T;
      }
      ASSERT_EQ(first, shape.S);
      EXPECT_EQ(joined, expected);
    }
  });
}

// Rounding a row to integers moves each value by at most half a step, largest / 254 (and fp32's own error, 4 u of
// it). A score is then off by at most s = scale * d * largest q * that, a weight by a factor of exp(2 s), and an
// output, a mean of values, by that much of the largest value and by half a step of its own.
TEST(Attention, Int8CacheIsCloseToTheValuesPutIn) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    std::mt19937 random(11);
    Sequence exact({90, 6, 2, 33, 16}, random);
    random.seed(11);
    Sequence rounded({90, 6, 2, 33, 16, DType::kI8}, random);
    const std::vector<float> out = rounded.run_chunk(0, 90, pool), expected = exact.run_chunk(0, 90, pool);
    const double step = 1.0 / 254 + 4 * kUnitRoundoff;
    const double score = exact.shape.scale * 33 * largest(exact.q) * (step + 1.0 / 65534) * largest(exact.k);
    const double fp32 = (2 * 90 + 32 + 2 * 33) * kUnitRoundoff, weights = 90.0 / 65534;
    const double tolerance = (std::expm1(2 * score) + step + fp32 + weights) * largest(exact.v);
    double most = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      ASSERT_NEAR(out[i], expected[i], tolerance) << i;
      most = std::max<double>(most, std::abs(out[i] - expected[i]));
    }
    EXPECT_GT(most, 0);
  });
}

// Several sequences in one call, decoding and with prompts: each row as in a call of its own. With one thread there are
// tasks enough to walk together.
TEST(Attention, SequencesInOneCallDoNotMatterToEachOther) {
  NativeThreadPool one(1), pool(3);
  for_each_isa([&] {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
      std::mt19937 random(12);
      const int64_t lengths[] = {70, 1, 129, 20}, last[] = {1, 1, 65, 20}, H = 12, G = 4, d = 32;
      std::vector<Sequence> sequences;
      for (const int64_t S : lengths) sequences.emplace_back(Shape{S, H, G, d, 16, dtype}, random);
      std::vector<float> expected, q, k, v;
      std::vector<AttentionChunk> chunks;
      int64_t row = 0;
      for (size_t i = 0; i < sequences.size(); ++i) {
        Sequence& s = sequences[i];
        const int64_t first = lengths[i] - last[i];
        if (first > 0) s.run_chunk(0, first, pool);
        const std::vector<float> out = s.run_chunk(first, last[i], pool);
        s.forget_behind(first, pool);
        expected.insert(expected.end(), out.begin(), out.end());
        q.insert(q.end(), s.q.begin() + first * H * d, s.q.end());
        k.insert(k.end(), s.k.begin() + first * G * d, s.k.end());
        v.insert(v.end(), s.v.begin() + first * G * d, s.v.end());
        chunks.push_back({s.kv, row, last[i], lengths[i]});
        row += last[i];
      }
      append_kv(chunks, k.data(), v.data(), sequences[0].shape, pool);
      for (ThreadPool* threads : {&one, &pool}) {
        std::vector<float> out(expected.size());
        attention(chunks, q.data(), sequences[0].shape, out.data(), *threads);
        EXPECT_EQ(out, expected);
      }
    }
  });
}

TEST(KvBlock, EveryByteBelongsToOnePart) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (const auto& [block_size, G, d, v] : {std::array<int64_t, 4>{64, 16, 64, 64}, {3, 5, 7, 9}, {5, 1, 7, 0}}) {
      const KvBlock block(dtype, block_size, G, d, v);
      const auto element = static_cast<int64_t>(dtype_size(dtype));
      const int64_t factors = dtype == DType::kI8 ? 4 * block_size : 0;
      std::vector<int> owners(static_cast<size_t>(block.bytes()));
      const auto own = [&](int64_t first, int64_t bytes) {
        for (int64_t i = first; i < first + bytes; ++i) ++owners.at(static_cast<size_t>(i));
      };
      for (int64_t g = 0; g < G; ++g) {
        own(block.keys(g), block_size * d * element);
        own(block.values(g), block_size * v * element);
        own(block.key_factors(g), factors);
        if (v > 0) own(block.value_factors(g), factors);
        EXPECT_EQ(block.key_factors(g) % 4, 0);
      }
      EXPECT_EQ(block.bytes() % 4, 0);
      EXPECT_LE(*std::max_element(owners.begin(), owners.end()), 1);
      EXPECT_LT(std::count(owners.begin(), owners.end(), 0), 4);  // before the factors, or at the end
    }
  }
}

TEST(Attention, NoTokensIsFine) {
  NativeThreadPool pool(1);
  attention({}, nullptr, {.H = 4, .G = 2, .d = 8, .v = 8}, nullptr, pool);
}

TEST(Attention, LargeScoresDoNotOverflow) {
  NativeThreadPool pool(1);
  for_each_isa([&] {
    std::mt19937 random(10);
    Sequence sequence({20, 1, 1, 16, 8}, random);
    for (float& value : sequence.q) value *= 1e4f;
    for (float value : sequence.run_chunk(0, 20, pool)) ASSERT_TRUE(std::isfinite(value));
  });
}

}  // namespace
}  // namespace coterie
