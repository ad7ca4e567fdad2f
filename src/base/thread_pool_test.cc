#include "base/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/task_shares.h"
#include "coterie/error.h"

namespace coterie {
namespace {

TEST(ThreadPool, RunsEveryIndexOnce) {
  for (int threads : {1, 2, 3, 8}) {
    NativeThreadPool pool(threads);
    ASSERT_EQ(pool.num_threads(), threads);
    for (int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> counts(static_cast<size_t>(tasks));
      std::atomic<int> strangers{0};
      pool.run(tasks, [&](int64_t index, int thread) {
        ++counts[index];
        if (thread < 0 || thread >= threads) ++strangers;
      });
      for (const auto& count : counts) ASSERT_EQ(count, 1);
      EXPECT_EQ(strangers, 0);
    }
  }
}

TEST(TaskShares, EveryThreadBeginsWithItsOwnAndThenHelps) {
  TaskShares shares(3);
  shares.assign(8);
  std::vector<int64_t> order;
  shares.drain(1, [&](int64_t index, int thread) {
    EXPECT_EQ(thread, 1);
    order.push_back(index);
  });
  EXPECT_EQ(order, (std::vector<int64_t>{2, 3, 4, 5, 6, 7, 0, 1}));
  shares.drain(0, [](int64_t index, int) { ADD_FAILURE() << index << " was taken before"; });
}

// run returns only when all is done, and the next job sees what the last one wrote.
TEST(ThreadPool, ManyShortJobsInOrder) {
  NativeThreadPool pool(3);
  std::vector<int64_t> values(17, 0);
  for (int64_t job = 0; job < 20000; ++job) {
    pool.run(17, [&](int64_t index, int) { values[index] += values[index] == job; });
  }
  for (int64_t value : values) EXPECT_EQ(value, 20000);
}

// Two tasks on one thread never overlap, so thread indices may be used for scratch memory.
TEST(ThreadPool, ThreadIndicesAreExclusive) {
  NativeThreadPool pool(4);
  std::vector<std::atomic<int>> inside(4);
  std::atomic<int> clashes{0};
  pool.run(2000, [&](int64_t, int thread) {
    if (++inside[thread] != 1) ++clashes;
    std::this_thread::yield();
    --inside[thread];
  });
  EXPECT_EQ(clashes, 0);
}

TEST(ThreadPool, SleepingWorkersWakeUp) {
  NativeThreadPool pool(2);
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::atomic<int> done{0};
    pool.run(100, [&](int64_t, int) { ++done; });
    EXPECT_EQ(done, 100);
  }
}

TEST(ThreadPool, RejectsNoThreads) { EXPECT_THROW(NativeThreadPool(0), InvalidArgument); }

}  // namespace
}  // namespace coterie
