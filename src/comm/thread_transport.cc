#include "comm/thread_transport.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>

#include "base/check.h"

namespace coterie {
namespace {

enum class State { kPosted, kCopying, kDone, kTooLong };

// One half of a message. Whoever posts the second half copies the bytes.
struct Half {
  int owner, peer;
  bool sends;
  void* data;
  size_t bytes;
  State state = State::kPosted;
};

struct Hub {
  explicit Hub(int ranks) : closed(static_cast<size_t>(ranks)) {}

  using Key = std::tuple<int, int, int>;  // sender, receiver, tag
  std::mutex mutex;
  std::condition_variable changed;
  std::map<Key, std::deque<std::shared_ptr<Half>>> waiting;  // all of a queue are sends, or all receives
  std::vector<bool> closed;

  void post(const Key& key, const std::shared_ptr<Half>& half) {
    std::unique_lock lock(mutex);
    std::deque<std::shared_ptr<Half>>& queue = waiting[key];
    if (queue.empty() || queue.front()->sends == half->sends) {
      queue.push_back(half);
      return;
    }
    const std::shared_ptr<Half> other = queue.front();
    queue.pop_front();
    if (queue.empty()) waiting.erase(key);
    half->state = other->state = half->bytes == other->bytes ? State::kCopying : State::kTooLong;
    lock.unlock();
    if (half->bytes == other->bytes) {
      const Half& sender = half->sends ? *half : *other;
      const Half& receiver = half->sends ? *other : *half;
      std::memcpy(receiver.data, sender.data, sender.bytes);
    }
    lock.lock();
    if (half->state == State::kCopying) half->state = other->state = State::kDone;
    changed.notify_all();
  }

  void close(int rank) {
    std::unique_lock lock(mutex);
    closed[static_cast<size_t>(rank)] = true;
    for (auto& [key, queue] : waiting) {
      std::erase_if(queue, [rank](const std::shared_ptr<Half>& half) { return half->owner == rank; });
    }
    changed.notify_all();
  }
};

class ThreadMessage final : public Message {
 public:
  ThreadMessage(std::shared_ptr<Hub> hub, std::shared_ptr<Half> half) : hub_(std::move(hub)), half_(std::move(half)) {}

  bool done() override {
    const std::lock_guard lock(hub_->mutex);
    return check();
  }

  bool wait(CommClock::time_point deadline) override {
    std::unique_lock lock(hub_->mutex);
    return hub_->changed.wait_until(lock, deadline, [this] { return check(); });
  }

 private:
  bool check() const {
    if (half_->state == State::kTooLong) throw TransportError("the two sides of a message differ in length");
    if (half_->state == State::kPosted && hub_->closed[static_cast<size_t>(half_->peer)]) {
      throw TransportError("it has ended");
    }
    return half_->state == State::kDone;
  }

  std::shared_ptr<Hub> hub_;
  std::shared_ptr<Half> half_;
};

class ThreadTransport final : public Transport {
 public:
  ThreadTransport(std::shared_ptr<Hub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}
  ~ThreadTransport() override { close(); }

  std::string_view name() const override { return "threads"; }
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(hub_->closed.size()); }
  bool can_poll() const override { return true; }

  std::unique_ptr<Message> send(int to, int tag, const void* data, size_t bytes) override {
    return post({rank_, to, tag}, to, true, const_cast<void*>(data), bytes);
  }
  std::unique_ptr<Message> receive(int from, int tag, void* data, size_t bytes) override {
    return post({from, rank_, tag}, from, false, data, bytes);
  }

  void close() noexcept override {
    hub_->close(rank_);
    // Others may still be copying from or to our memory.
    std::unique_lock lock(hub_->mutex);
    hub_->changed.wait(lock, [this] {
      return std::none_of(posted_.begin(), posted_.end(), [](const std::weak_ptr<Half>& weak) {
        const std::shared_ptr<Half> half = weak.lock();
        return half && half->state == State::kCopying;
      });
    });
    posted_.clear();
  }

 private:
  std::unique_ptr<Message> post(const Hub::Key& key, int peer, bool sends, void* data, size_t bytes) {
    auto half = std::make_shared<Half>(Half{rank_, peer, sends, data, bytes});
    std::erase_if(posted_, [](const std::weak_ptr<Half>& old) { return old.expired(); });
    posted_.push_back(half);
    hub_->post(key, half);
    return std::make_unique<ThreadMessage>(hub_, std::move(half));
  }

  std::shared_ptr<Hub> hub_;
  int rank_;
  std::vector<std::weak_ptr<Half>> posted_;
};

}  // namespace

std::vector<std::unique_ptr<Transport>> make_thread_transports(int ranks) {
  COTERIE_CHECK(ranks > 0, "no ranks");
  const auto hub = std::make_shared<Hub>(ranks);
  std::vector<std::unique_ptr<Transport>> transports;
  for (int rank = 0; rank < ranks; ++rank) transports.push_back(std::make_unique<ThreadTransport>(hub, rank));
  return transports;
}

void run_ranks(int ranks, double timeout_s, const std::function<void(ProcessGroup& world)>& body) {
  std::vector<std::unique_ptr<Transport>> transports = make_thread_transports(ranks);
  std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < errors.size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        ProcessGroup world(std::move(transports[rank]), timeout_s);
        body(world);
      } catch (...) {
        errors[rank] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace coterie
