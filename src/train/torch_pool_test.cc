// Polling between the tasks of torch's pool.
#include "train/torch_pool.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

namespace coterie {
namespace {

TEST(PollBetweenTasks, RunsOnItsThreadAfterEachTask) {
  const int threads_before = at::get_num_threads();
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const std::thread::id own = std::this_thread::get_id();
    std::atomic<int> tasks{0}, own_tasks{0};
    int polls = 0, inner_polls = 0;
    const auto run = [&] {
      torch_pool().run(100, [&](int64_t /*index*/, int /*thread*/) {
        ++tasks;
        if (std::this_thread::get_id() == own) ++own_tasks;
      });
    };
    {
      const PollBetweenTasks poll([&] {
        EXPECT_EQ(std::this_thread::get_id(), own);
        ++polls;
      });
      run();
      EXPECT_EQ(polls, own_tasks);
      {
        const PollBetweenTasks inner([&] { ++inner_polls; });
        run();
      }
      EXPECT_EQ(polls + inner_polls, own_tasks);
      run();
      EXPECT_EQ(polls + inner_polls, own_tasks);
    }
    run();
    EXPECT_EQ(tasks, 400);
    if (threads == 1) {
      EXPECT_EQ(polls + inner_polls, 300);
    }
  }
  at::set_num_threads(threads_before);
}

}  // namespace
}  // namespace coterie
