#include "base/thread_pool.h"

#include <immintrin.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/task_shares.h"
#include "coterie/error.h"

namespace coterie {

// A job is published by raising `generation`; workers spin on it for a short while (a decode step
// has hundreds of short jobs, and the next step follows soon) and then sleep. `shares` hands out task indices; `active`
// counts the workers that have not yet left the job, so that `task` stays valid until all are out.
struct NativeThreadPool::State {
  // 100 to 400 us, by processor: longer than the gap between two jobs of a forward pass, and than what a program in
  // Python does with one token before it asks for the next step (50 us).
  static constexpr int kSpins = 8000;
  // Of the caller, who waits for the last tasks, before it gives way: there may be more threads than processors.
  static constexpr int kSpinsOfCaller = 2000;

  explicit State(int num_threads) : shares(num_threads) {}

  std::vector<std::thread> workers;
  std::atomic<uint64_t> generation{0};
  TaskShares shares;
  std::atomic<int> active{0};
  const std::function<void(int64_t, int)>* task = nullptr;
  std::atomic<bool> stopping{false};
  std::mutex mutex;
  std::condition_variable wake;

  void drain(int thread) { shares.drain(thread, *task); }

  uint64_t wait_for_job(uint64_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      const uint64_t now = generation.load(std::memory_order_acquire);
      if (now != seen) return now;
      _mm_pause();
    }
    std::unique_lock lock(mutex);
    wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
    return generation.load(std::memory_order_acquire);
  }

  void publish() {
    {
      std::lock_guard lock(mutex);
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
  }

  void work(int thread) {
    uint64_t seen = 0;
    while (true) {
      seen = wait_for_job(seen);
      if (stopping) return;
      drain(thread);
      active.fetch_sub(1, std::memory_order_release);
    }
  }
};

NativeThreadPool::NativeThreadPool(int num_threads) {
  if (num_threads < 1) throw InvalidArgument("threads: " + std::to_string(num_threads) + " is below 1");
  state_ = std::make_unique<State>(num_threads);
  for (int thread = 1; thread < num_threads; ++thread) {
    state_->workers.emplace_back([state = state_.get(), thread] { state->work(thread); });
  }
}

NativeThreadPool::~NativeThreadPool() {
  state_->stopping = true;
  state_->publish();
  for (std::thread& worker : state_->workers) worker.join();
}

int NativeThreadPool::num_threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void NativeThreadPool::run(int64_t num_tasks, const std::function<void(int64_t, int)>& task) {
  if (num_tasks <= 0) return;
  if (num_tasks == 1 || state_->workers.empty()) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i, 0);
    return;
  }
  state_->task = &task;
  state_->shares.assign(num_tasks);
  state_->active.store(static_cast<int>(state_->workers.size()), std::memory_order_relaxed);
  state_->publish();
  state_->drain(0);
  int spins = 0;
  while (state_->active.load(std::memory_order_acquire) != 0) {
    _mm_pause();
    if (++spins > State::kSpinsOfCaller) std::this_thread::yield();
  }
}

}  // namespace coterie
