// Memory that will be needed has its pages provided ahead of that (provide_pages), by a thread of its own that runs
// where a processor has nothing else to do.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <span>
#include <thread>

namespace coterie {

class PageProvider {
 public:
  PageProvider();
  ~PageProvider();  // waits for a piece at most
  PageProvider(const PageProvider&) = delete;
  PageProvider& operator=(const PageProvider&) = delete;

  // In the order of the calls. The memory must outlive the provider, but may be used at once.
  void provide(std::span<std::byte> memory);
  // In the first moment, and until resume() was called and nothing came for a moment, no page is provided (but for a
  // piece that was begun): even a thread that others may displace at once takes time from threads that wait for each
  // other.
  void pause();
  void resume();

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kMoment = std::chrono::milliseconds(20);

  void work();
  bool may_work() const { return !paused_ && !pieces_.empty(); }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::span<std::byte>> pieces_;  // the first one is being provided
  bool paused_ = false, stopping_ = false;
  Clock::time_point resume_at_ = Clock::now() + kMoment;
  std::thread thread_;
};

}  // namespace coterie
