#include "train/torch_pool.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>

#include "base/task_shares.h"

namespace coterie {
namespace {

thread_local const std::function<void()>* between_tasks = nullptr;

class TorchThreadPool : public ThreadPool {
 public:
  int num_threads() const override { return at::get_num_threads(); }

  void run(int64_t num_tasks, const std::function<void(int64_t, int)>& task) override {
    const int64_t slots = std::min<int64_t>(num_tasks, at::get_num_threads());
    TaskShares shares(static_cast<int>(slots));
    shares.assign(num_tasks);
    at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t /*end*/) {
      // One worker may be given several slots; draining under one of them is enough.
      shares.drain(static_cast<int>(begin), [&](int64_t index, int thread) {
        task(index, thread);
        if (between_tasks) (*between_tasks)();
      });
    });
  }
};

}  // namespace

PollBetweenTasks::PollBetweenTasks(std::function<void()> poll)
    : poll_(std::move(poll)), outer_(std::exchange(between_tasks, &poll_)) {}

PollBetweenTasks::~PollBetweenTasks() { between_tasks = outer_; }

ThreadPool& torch_pool() {
  static TorchThreadPool pool;
  return pool;
}

}  // namespace coterie
