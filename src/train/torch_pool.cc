#include "train/torch_pool.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "base/task_shares.h"

namespace coterie {
namespace {

class TorchThreadPool : public ThreadPool {
 public:
  int num_threads() const override { return at::get_num_threads(); }

  void run(int64_t num_tasks, const std::function<void(int64_t, int)>& task) override {
    const int64_t slots = std::min<int64_t>(num_tasks, at::get_num_threads());
    TaskShares shares(static_cast<int>(slots));
    shares.assign(num_tasks);
    at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t /*end*/) {
      // One worker may be given several slots; draining under one of them is enough.
      shares.drain(static_cast<int>(begin), task);
    });
  }
};

}  // namespace

ThreadPool& torch_pool() {
  static TorchThreadPool pool;
  return pool;
}

}  // namespace coterie
