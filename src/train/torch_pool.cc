#include "train/torch_pool.h"

#include <ATen/Parallel.h>

#include <atomic>

namespace coterie {
namespace {

class TorchThreadPool : public ThreadPool {
 public:
  int num_threads() const override { return at::get_num_threads(); }

  void run(int64_t num_tasks, const std::function<void(int64_t, int)>& task) override {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(num_tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
      // One worker may be given several slots; draining under one of them is enough.
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) task(i, static_cast<int>(slot));
      }
    });
  }
};

}  // namespace

ThreadPool& torch_pool() {
  static TorchThreadPool pool;
  return pool;
}

}  // namespace coterie
