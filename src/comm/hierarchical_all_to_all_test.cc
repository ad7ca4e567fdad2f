// The two-step exchange against the plain one, which process_group_test.cc holds against loops.
#include "comm/hierarchical_all_to_all.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "comm/test_support.h"
#include "comm/thread_transport.h"
#include "coterie/error.h"

namespace coterie {
namespace {

constexpr double kTimeout = 30;

// Ranks and ranks per node.
class Topologies : public testing::TestWithParam<std::tuple<int, int>> {};

TEST_P(Topologies, TheResultIsThePlainExchangesToTheByte) {
  const auto [ranks, per_node] = GetParam();
  const auto uneven = [](int from, int to) { return int64_t{(from * 7 + to * 3) % 5} * 131; };
  const auto sparse = [](int from, int to) { return int64_t{(from + 2 * to) % 6 == 0 ? 3000 : 0}; };
  const auto one_target = [](int, int to) { return int64_t{to == 1 ? 77 : 0}; };
  const auto nothing = [](int, int) { return int64_t{0}; };
  run_ranks(ranks, kTimeout, [&, per_node = per_node](ProcessGroup& world) {
    AllToAll all_to_all(world, per_node, AllToAllAlgorithm::kHierarchical, {}, 0);
    ASSERT_EQ(all_to_all.hierarchical(), per_node > 1 && per_node < world.size());
    for (const int64_t gap : {0, 3}) {  // without gaps a node's blocks arrive in place
      for (const auto& bytes :
           {BytesBetween(uneven), BytesBetween(sparse), BytesBetween(one_target), BytesBetween(nothing)}) {
        UnevenExchange dispatch(world.rank(), world.size(), bytes, gap);
        // The way back: what came is what goes.
        UnevenExchange combine(world.rank(), world.size(), [&](int from, int to) { return bytes(to, from); }, gap);
        Work first = all_to_all.start(dispatch.arguments(), "dispatch");
        Work second = all_to_all.start(combine.arguments(), "combine");
        if (world.rank() % 2 == 0) first.wait();
        second.wait();
        first.wait();
        EXPECT_EQ(dispatch.output, dispatch.expected);
        EXPECT_EQ(combine.output, combine.expected);
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(AllToAll, Topologies,
                         testing::Values(std::tuple(8, 2), std::tuple(8, 4), std::tuple(6, 3), std::tuple(9, 3),
                                         std::tuple(4, 2), std::tuple(4, 4), std::tuple(4, 1)));

TEST(AllToAll, SmallMessagesGoInTwoStepsLargeOnesInOne) {
  // Inside 1 us and 10 GB/s, between 20 us and 1 GB/s.
  const LinkModel model{{1e-6, 1e-10}, {20e-6, 1e-9}};
  // 8 ranks, 4 nodes of 2: 1 and 6 messages, or 3 inside (32 bytes of counts, 100, 300) and 3 of twice the bytes
  // between.
  EXPECT_DOUBLE_EQ(flat_seconds(model, 8, 2, 100), 1e-6 + 100e-10 + 6 * (20e-6 + 100e-9));
  EXPECT_DOUBLE_EQ(hierarchical_seconds(model, 8, 2, 100),
                   (1e-6 + 32e-10) + (1e-6 + 100e-10) + (1e-6 + 300e-10) + 3 * (20e-6 + 200e-9));
  run_ranks(8, kTimeout, [&](ProcessGroup& world) {
    const auto chooses = [&](AllToAllAlgorithm algorithm, int per_node, int64_t bytes) {
      return AllToAll(world, per_node, algorithm, model, bytes).hierarchical();
    };
    EXPECT_TRUE(chooses(AllToAllAlgorithm::kAuto, 2, 1000));
    EXPECT_FALSE(chooses(AllToAllAlgorithm::kAuto, 2, 10'000'000));  // both send as much between; inside it costs more
    EXPECT_TRUE(chooses(AllToAllAlgorithm::kHierarchical, 2, 10'000'000));
    EXPECT_FALSE(chooses(AllToAllAlgorithm::kFlat, 2, 1000));
    EXPECT_FALSE(chooses(AllToAllAlgorithm::kHierarchical, 8, 1000));
    EXPECT_FALSE(chooses(AllToAllAlgorithm::kHierarchical, 1, 1000));
  });
}

TEST(AllToAll, AllRanksAgreeOnTheLinks) {
  for (const int per_node : {1, 2, 3, 6}) {
    std::vector<LinkModel> models(6);
    run_ranks(6, kTimeout,
              [&](ProcessGroup& world) { models[static_cast<size_t>(world.rank())] = measure_links(world, per_node); });
    for (const LinkModel& model : models) {
      EXPECT_GT(model.inside.seconds(1000), 0);
      EXPECT_GT(model.between.seconds(1000), 0);
      EXPECT_EQ(model.inside.latency_s, models[0].inside.latency_s);
      EXPECT_EQ(model.inside.s_per_byte, models[0].inside.s_per_byte);
      EXPECT_EQ(model.between.latency_s, models[0].between.latency_s);
      EXPECT_EQ(model.between.s_per_byte, models[0].between.s_per_byte);
    }
  }
}

template <typename Action>
std::string refusal(Action&& action) {
  try {
    action();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(AllToAll, WrongOptionsAreRefused) {
  run_ranks(1, kTimeout, [](ProcessGroup& world) {
    EXPECT_EQ(refusal([&] { AllToAll(world, 2, AllToAllAlgorithm::kAuto, {}, 0); }),
              "comm.ranks_per_node: does not divide the 1 ranks of group world (2)");
    EXPECT_EQ(refusal([&] { measure_links(world, 0); }),
              "comm.ranks_per_node: does not divide the 1 ranks of group world (0)");
  });
  EXPECT_EQ(refusal([] { all_to_all_algorithm_from_name("tree"); }),
            "comm.all_to_all: must be auto, flat or hierarchical (\"tree\")");
  EXPECT_EQ(all_to_all_algorithm_from_name("flat"), AllToAllAlgorithm::kFlat);
}

}  // namespace
}  // namespace coterie
