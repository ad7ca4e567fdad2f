// Who of a pool runs which task: every thread has a share of consecutive indices, and helps others when it is done.
//
// The same job finds its data in the caches of the same processors again, a thread reads memory in order, and threads
// that are disturbed lose no more than the task they are at.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace coterie {

class TaskShares {
 public:
  explicit TaskShares(int num_threads) : shares_(static_cast<size_t>(num_threads)) {}

  // Before the threads begin.
  void assign(int64_t num_tasks) {
    const auto threads = static_cast<int64_t>(shares_.size());
    for (int64_t t = 0; t < threads; ++t) {
      shares_[t].next.store(num_tasks * t / threads, std::memory_order_relaxed);
      shares_[t].end = num_tasks * (t + 1) / threads;
    }
  }

  // Calls task(index, thread) for indices that nobody has taken yet, until there are none.
  template <typename Task>
  void drain(int thread, const Task& task) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(static_cast<size_t>(thread) + i) % shares_.size()];
      for (int64_t t = share.next.fetch_add(1); t < share.end; t = share.next.fetch_add(1)) task(t, thread);
    }
  }

 private:
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::vector<Share> shares_;
};

}  // namespace coterie
