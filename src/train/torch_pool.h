// The ThreadPool that borrows torch's threads (OpenMP), so that our kernels and ATen's ops share one
// set of threads. at::set_num_threads decides how many; call it before training starts.
#pragma once

#include <functional>

#include "base/thread_pool.h"

namespace coterie {

ThreadPool& torch_pool();

// While it lives, the thread that made it calls `poll` after each task that it runs in torch_pool().run(): so that
// messages go on during long computations (ProcessGroup::progress). `poll` doesn't throw.
class PollBetweenTasks {
 public:
  explicit PollBetweenTasks(std::function<void()> poll);
  ~PollBetweenTasks();
  PollBetweenTasks(const PollBetweenTasks&) = delete;

 private:
  const std::function<void()> poll_;
  const std::function<void()>* const outer_;
};

}  // namespace coterie
