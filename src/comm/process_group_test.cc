// Every operation on ranks that are threads, against plain loops over the same numbers.
#include "comm/process_group.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <regex>
#include <thread>

#include "comm/reduce.h"
#include "comm/test_support.h"
#include "comm/thread_transport.h"
#include "comm/transport.h"
#include "coterie/error.h"

namespace coterie {
namespace {

constexpr double kTimeout = 30;

// Bytes of what `rank` has for `peer` in a round; many are 0.
int64_t bytes_between(int from, int to, int round) {
  const int64_t value = (from * 7 + to * 3 + round * 5) % 11;
  return value < 4 ? 0 : value * value * 13;
}

std::byte byte_of(int from, int to, int64_t index) { return static_cast<std::byte>(from * 31 + to * 17 + index * 7); }

class Ranks : public testing::TestWithParam<int> {};

TEST_P(Ranks, AllReduceAddsInRankOrder) {
  for (const int64_t count : {0, 1, 3, 1000, 5000}) {  // the direct way and the way over blocks
    run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
      std::vector<float> sum = random_floats(world.rank(), count), expected(sum.size()), most(sum.size());
      for (int r = 0; r < world.size(); ++r) {
        const std::vector<float> part = random_floats(r, count);
        for (size_t i = 0; i < part.size(); ++i) {
          expected[i] = r == 0 ? part[i] : expected[i] + part[i];
          most[i] = r == 0 ? part[i] : std::max(most[i], part[i]);
        }
      }
      std::vector<float> max = sum;
      Work first = world.start_all_reduce(sum.data(), count, DType::kF32, ReduceOp::kSum, "sum");
      Work second = world.start_all_reduce(max.data(), count, DType::kF32, ReduceOp::kMax, "max");
      if (world.rank() % 2 == 0) first.wait();  // the order of the waits is each rank's own
      second.wait();
      first.wait();
      EXPECT_EQ(sum, expected);
      EXPECT_EQ(max, most);
    });
  }
}

TEST_P(Ranks, BFloat16IsRoundedOnce) {
  const int64_t count = 4001;
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    const auto part = [&](int rank) {
      std::vector<BFloat16> values;
      for (const float x : random_floats(rank, count)) values.push_back(to_bfloat16(x));
      return values;
    };
    std::vector<float> expected(static_cast<size_t>(count));
    for (int r = 0; r < world.size(); ++r) {
      const std::vector<BFloat16> values = part(r);
      for (size_t i = 0; i < values.size(); ++i) expected[i] = (r ? expected[i] : 0) + to_float(values[i]);
    }
    std::vector<BFloat16> sum = part(world.rank());
    world.all_reduce(sum.data(), count, DType::kBF16, ReduceOp::kSum, "");
    for (size_t i = 0; i < sum.size(); ++i) ASSERT_EQ(sum[i].bits, to_bfloat16(expected[i]).bits) << i;
  });
}

TEST_P(Ranks, Int64WrapsAroundAndKeepsItsSign) {
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    const int64_t most = std::numeric_limits<int64_t>::max();
    int64_t sum[3] = {most, -5, world.rank()}, max[2] = {-world.rank() - 1, world.rank()};
    world.all_reduce(sum, 3, DType::kI64, ReduceOp::kSum, "");
    world.all_reduce(max, 2, DType::kI64, ReduceOp::kMax, "");
    const auto n = static_cast<uint64_t>(world.size());
    EXPECT_EQ(sum[0], static_cast<int64_t>(static_cast<uint64_t>(most) * n));
    EXPECT_EQ(sum[1], -5 * world.size());
    EXPECT_EQ(sum[2], world.size() * (world.size() - 1) / 2);
    EXPECT_EQ(max[0], -1);
    EXPECT_EQ(max[1], world.size() - 1);
  });
}

TEST_P(Ranks, ReduceScatterGivesEachRankItsBlockInPlaceToo) {
  for (const int64_t count : {0, 1, 3000}) {
    run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
      const int64_t all = count * world.size(), begin = count * world.rank();
      std::vector<float> expected(static_cast<size_t>(count));
      for (int r = 0; r < world.size(); ++r) {
        const std::vector<float> part = random_floats(r, all);
        for (size_t i = 0; i < expected.size(); ++i) {
          const float x = part[static_cast<size_t>(begin) + i];
          expected[i] = r == 0 ? x : expected[i] + x;
        }
      }
      std::vector<float> input = random_floats(world.rank(), all), output(static_cast<size_t>(count));
      world.reduce_scatter(input.data(), output.data(), count, DType::kF32, ReduceOp::kSum, "");
      EXPECT_EQ(output, expected);
      world.reduce_scatter(input.data(), input.data() + begin, count, DType::kF32, ReduceOp::kSum, "in place");
      EXPECT_EQ(std::vector<float>(input.begin() + begin, input.begin() + begin + count), expected);
    });
  }
}

TEST_P(Ranks, AllGatherKeepsRankOrderInPlaceToo) {
  for (const int64_t bytes : {0, 1, 5000}) {
    run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
      std::vector<std::byte> expected, own;
      for (int r = 0; r < world.size(); ++r) {
        for (int64_t i = 0; i < bytes; ++i) expected.push_back(byte_of(r, 0, i));
      }
      for (int64_t i = 0; i < bytes; ++i) own.push_back(byte_of(world.rank(), 0, i));
      std::vector<std::byte> all(expected.size()), in_place(expected.size());
      world.all_gather(own.data(), all.data(), bytes, "");
      std::copy(own.begin(), own.end(), in_place.begin() + world.rank() * bytes);
      world.all_gather(in_place.data() + world.rank() * bytes, in_place.data(), bytes, "in place");
      EXPECT_EQ(all, expected);
      EXPECT_EQ(in_place, expected);
    });
  }
}

TEST_P(Ranks, AllToAllVMovesUnevenBlocksAndNothing) {
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    for (int round = 0; round < 11; ++round) {
      UnevenExchange exchange(world.rank(), world.size(), [&](int a, int b) { return bytes_between(a, b, round); });
      world.all_to_all_v(exchange.arguments(), "dispatch");
      EXPECT_EQ(exchange.output, exchange.expected) << round;
    }
  });
}

TEST_P(Ranks, BroadcastComesFromAnyRoot) {
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    for (int root = 0; root < world.size(); ++root) {
      std::vector<float> data = random_floats(world.rank(), 777);
      world.broadcast(data.data(), 777 * 4, root, "");
      EXPECT_EQ(data, random_floats(root, 777));
    }
  });
}

TEST_P(Ranks, BarrierWaitsForTheLast) {
  std::atomic<int> arrived{0};
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    std::this_thread::sleep_for(std::chrono::milliseconds(world.rank() * 3));
    ++arrived;
    world.barrier("");
    EXPECT_EQ(arrived, world.size());
  });
}

TEST_P(Ranks, SplitMakesGroupsInTheOrderOfTheirKeys) {
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    const int color = world.rank() % 3 == 2 ? -1 : world.rank() % 3;
    const auto group = world.split(color, -world.rank(), "third");
    ASSERT_EQ(group == nullptr, color < 0);
    if (group) {
      std::vector<int> members;
      for (int r = world.size() - 1; r >= 0; --r) {
        if (r % 3 == color) members.push_back(r);
      }
      ASSERT_EQ(group->size(), static_cast<int>(members.size()));
      for (size_t i = 0; i < members.size(); ++i) EXPECT_EQ(group->world_rank(static_cast<int>(i)), members[i]);
      EXPECT_EQ(group->world_rank(group->rank()), world.rank());
      EXPECT_EQ(group->name(), "third");
      int64_t sum = world.rank();
      group->all_reduce(&sum, 1, DType::kI64, ReduceOp::kSum, "");
      EXPECT_EQ(sum, std::accumulate(members.begin(), members.end(), int64_t{0}));
    }
  });
}

TEST_P(Ranks, GroupsThatShareRanksDontMixTheirMessages) {
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    std::vector<int> all(static_cast<size_t>(world.size())), last{world.size() - 1};
    std::iota(all.rbegin(), all.rend(), 0);
    const auto backwards = world.subgroup(all, "backwards");
    const auto only = world.subgroup(last, "only");
    EXPECT_EQ(only != nullptr, world.rank() == world.size() - 1);
    EXPECT_EQ(backwards->rank(), world.size() - 1 - world.rank());
    const auto inner = backwards->split(0, 0, "inner");  // of a subgroup: ids differ from both
    std::vector<ProcessGroup*> groups = {&world, backwards.get(), inner.get()};
    constexpr size_t kCount = 1000;  // two stages
    std::vector<std::vector<int64_t>> sums;
    std::vector<Work> works;
    for (size_t i = 0; i < 30; ++i) sums.emplace_back(kCount, static_cast<int64_t>(i) * 1000 + world.rank());
    for (size_t i = 0; i < sums.size(); ++i) {
      works.push_back(groups[i % 3]->start_all_reduce(sums[i].data(), kCount, DType::kI64, ReduceOp::kSum, ""));
    }
    const bool reverse = world.rank() % 2 == 1;
    for (size_t i = 0; i < works.size(); ++i) works[reverse ? works.size() - 1 - i : i].wait();
    for (size_t i = 0; i < sums.size(); ++i) {
      const int64_t sum = static_cast<int64_t>(i) * 1000 * world.size() + world.size() * (world.size() - 1) / 2;
      EXPECT_EQ(sums[i], std::vector<int64_t>(kCount, sum));
    }
  });
}

TEST_P(Ranks, AnOperationIsDoneWithoutItsWait) {
  run_ranks(GetParam(), kTimeout, [&](ProcessGroup& world) {
    std::vector<float> sum(5000, 1.0f);
    {
      Work work = world.start_all_reduce(sum.data(), 5000, DType::kF32, ReduceOp::kSum, "");
      while (!work.done()) std::this_thread::yield();
      EXPECT_EQ(sum[4999], static_cast<float>(world.size()));
      Work forgotten = world.start_all_reduce(sum.data(), 5000, DType::kF32, ReduceOp::kSum, "");
    }
    EXPECT_EQ(sum[0], static_cast<float>(world.size() * world.size()));
  });
}

INSTANTIATE_TEST_SUITE_P(ProcessGroup, Ranks, testing::Values(1, 2, 3, 4, 7));

TEST(Reduce, ANanWinsWhereverItStands) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> a = {nan, 1, 2}, b = {1, nan, 3};
  const std::vector<const void*> inputs = {a.data(), b.data()};
  std::vector<float> out(3);
  reduce(inputs, out.data(), 3, DType::kF32, ReduceOp::kMax);
  EXPECT_TRUE(std::isnan(out[0]) && std::isnan(out[1]));
  EXPECT_EQ(out[2], 3);
}

TEST(Failure, TheRanksThatDidNotArriveAreNamed) {
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::string> lines(5);
  run_ranks(5, 0.3, [&](ProcessGroup& world) {
    const auto group = world.split(world.rank() == 0 ? -1 : 0, 0, "ep4");
    const bool present = world.rank() == 2 || world.rank() == 4;
    if (!present) {
      std::this_thread::sleep_for(std::chrono::milliseconds(600));
      return;
    }
    float data[2000] = {};
    try {
      group->all_reduce(data, 2000, DType::kF32, ReduceOp::kSum, "layer 3 gate");
    } catch (const CommError& error) {
      lines[static_cast<size_t>(world.rank())] = error.what();
      EXPECT_THROW(world.barrier(""), CommError);  // relatives are broken too, at once
    }
  });
  EXPECT_EQ(lines[2], "rank 2, group ep4: all_reduce 'layer 3 gate': ranks 1, 3 did not arrive within 0.3 s");
  EXPECT_EQ(lines[4], "rank 4, group ep4: all_reduce 'layer 3 gate': ranks 1, 3 did not arrive within 0.3 s");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
}

TEST(Failure, ARankThatHasEndedIsLostAtOnce) {
  std::string line;
  run_ranks(3, 1000, [&](ProcessGroup& world) {
    if (world.rank() == 1) return;
    try {
      world.barrier("step 7");
    } catch (const CommError& error) {
      if (world.rank() == 0) line = error.what();
    }
  });
  // Rank 2 ends too, when it has noticed; whoever looks later may see that first.
  const std::regex expected("rank 0, group world: barrier 'step 7': rank [12] is lost after [0-9.]+ s: it has ended");
  EXPECT_TRUE(std::regex_match(line, expected)) << line;
}

TEST(Failure, OneWaitDoesNotHideBehindAnother) {
  // Rank 0 waits for its second operation, while rank 1 can't go on without the second stage of the first.
  run_ranks(2, kTimeout, [&](ProcessGroup& world) {
    std::vector<float> a(5000, 1), b(5000, 2);
    Work first = world.start_all_reduce(a.data(), 5000, DType::kF32, ReduceOp::kSum, "first");
    Work second;
    if (world.rank() == 1) first.wait();
    second = world.start_all_reduce(b.data(), 5000, DType::kF32, ReduceOp::kSum, "second");
    second.wait();
    first.wait();
    EXPECT_EQ(a[4999], 2);
    EXPECT_EQ(b[0], 4);
  });
}

TEST(Failure, SizesThatDifferAreAnError) {
  std::atomic<int> errors{0};
  run_ranks(2, kTimeout, [&](ProcessGroup& world) {
    std::vector<std::byte> input(100), output(200);
    try {
      world.all_gather(input.data(), output.data(), world.rank() == 0 ? 10 : 20, "");
    } catch (const CommError& error) {
      ++errors;
    }
  });
  EXPECT_GE(errors, 1);
}

TEST(Failure, ATimeoutMustBePositive) {
  try {
    ProcessGroup world(std::move(make_thread_transports(1)[0]), 0);
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()), "comm.timeout_s: must be positive (0.000000)");
  }
}

TEST(Failure, WrongArgumentsAreRefused) {
  run_ranks(1, kTimeout, [](ProcessGroup& world) {
    float x = 0;
    const int there_twice[2] = {0, 0}, outside[1] = {1};
    EXPECT_THROW(world.all_reduce(&x, 1, DType::kF16, ReduceOp::kSum, ""), std::logic_error);
    EXPECT_THROW(world.all_reduce(&x, -1, DType::kF32, ReduceOp::kSum, ""), std::logic_error);
    EXPECT_THROW(world.broadcast(&x, 4, 1, ""), std::logic_error);
    EXPECT_THROW(world.subgroup(there_twice, ""), std::logic_error);
    EXPECT_THROW(world.subgroup(outside, ""), std::logic_error);
    EXPECT_THROW(world.all_to_all_v({}, ""), std::logic_error);
  });
}

}  // namespace
}  // namespace coterie
