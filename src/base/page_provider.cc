#include "base/page_provider.h"

#include <sched.h>

#include <algorithm>

#include "base/memory.h"

namespace coterie {

PageProvider::PageProvider() : thread_([this] { work(); }) {}

PageProvider::~PageProvider() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void PageProvider::provide(std::span<std::byte> memory) {
  constexpr size_t kPiece = size_t{2} << 20;  // takes some milliseconds at most
  {
    const std::lock_guard lock(mutex_);
    for (size_t at = 0; at < memory.size(); at += kPiece) {
      pieces_.push_back(memory.subspan(at, std::min(kPiece, memory.size() - at)));
    }
  }
  changed_.notify_all();
}

void PageProvider::pause() {
  const std::lock_guard lock(mutex_);
  paused_ = true;
}

void PageProvider::resume() {
  {
    const std::lock_guard lock(mutex_);
    paused_ = false;
    resume_at_ = Clock::now() + kMoment;
  }
  changed_.notify_all();
}

void PageProvider::work() {
  const sched_param param = {};
  sched_setscheduler(0, SCHED_IDLE, &param);  // this thread alone; where that is refused it is one like the others
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || may_work(); });
    if (stopping_) return;
    if (Clock::now() < resume_at_) {
      changed_.wait_until(lock, resume_at_, [&] { return stopping_; });
      continue;
    }
    const std::span<std::byte> piece = pieces_.front();
    lock.unlock();
    provide_pages(piece.data(), piece.size());
    lock.lock();
    pieces_.pop_front();
  }
}

}  // namespace coterie
