#include "train/torch_process_group.h"

#include <ATen/ops/from_blob.h>

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <utility>
#include <vector>

#include "comm/transport.h"
#include "coterie/error.h"

namespace coterie {
namespace {

using Milliseconds = std::chrono::milliseconds;

// "[pair.cc:545] Read error: Connection reset by peer. This is typically ...", a trace: what happened, of all that.
std::string reason_of(const std::exception& error) {
  std::string what = error.what();
  what = what.substr(0, std::min(what.find('\n'), what.find(". This is typically")));
  if (const size_t end = what.find("] "); what.starts_with('[') && end != what.npos) what = what.substr(end + 2);
  return what;
}

class GlooMessage final : public Message {
 public:
  explicit GlooMessage(c10::intrusive_ptr<c10d::Work> work) : work_(std::move(work)) {}

  bool done() override { return done_; }

  bool wait(CommClock::time_point deadline) override {
    if (done_) return true;
    // 0 means no limit to torch.
    const auto left = std::chrono::ceil<Milliseconds>(deadline - CommClock::now());
    try {
      done_ = work_->wait(std::max(left, Milliseconds(1)));
    } catch (const std::exception& error) {
      if (CommClock::now() >= deadline) return false;
      throw TransportError(reason_of(error));
    }
    return done_;
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  bool done_ = false;
};

class GlooTransport final : public Transport {
 public:
  explicit GlooTransport(c10::intrusive_ptr<c10d::Backend> backend) : backend_(std::move(backend)) {}

  std::string_view name() const override { return "gloo"; }
  int rank() const override { return backend_->getRank(); }
  int size() const override { return backend_->getSize(); }
  bool can_poll() const override { return false; }

  std::unique_ptr<Message> send(int to, int tag, const void* data, size_t bytes) override {
    return post(const_cast<void*>(data), bytes, [&](auto& tensors) { return backend_->send(tensors, to, tag); });
  }
  std::unique_ptr<Message> receive(int from, int tag, void* data, size_t bytes) override {
    return post(data, bytes, [&](auto& tensors) { return backend_->recv(tensors, from, tag); });
  }

  // A wait that runs out of time makes Gloo close every connection of the group.
  void close() noexcept override {
    for (const c10::weak_intrusive_ptr<c10d::Work>& weak : works_) {
      try {
        if (const c10::intrusive_ptr<c10d::Work> work = weak.lock()) work->wait(Milliseconds(1));
      } catch (const std::exception&) {
        break;
      }
    }
    works_.clear();
  }

 private:
  template <typename Begin>
  std::unique_ptr<Message> post(void* data, size_t bytes, Begin&& begin) {
    std::vector<at::Tensor> tensors = {at::from_blob(data, {static_cast<int64_t>(bytes)}, at::kByte)};
    try {
      const c10::intrusive_ptr<c10d::Work> work = begin(tensors);
      std::erase_if(works_, [](const auto& old) { return old.expired(); });
      works_.emplace_back(work);
      return std::make_unique<GlooMessage>(work);
    } catch (const std::exception& error) {
      throw TransportError(reason_of(error));
    }
  }

  c10::intrusive_ptr<c10d::Backend> backend_;
  std::vector<c10::weak_intrusive_ptr<c10d::Work>> works_;  // perhaps under way
};

}  // namespace

std::unique_ptr<ProcessGroup> torch_process_group(const std::string& name, double timeout_s) {
  if (!c10d::is_process_group_registered(name)) {
    throw InvalidArgument("torch.distributed has no process group '" + name + "'");
  }
  const c10::intrusive_ptr<c10d::Backend> backend = c10d::resolve_process_group(name)->getBackend(c10::DeviceType::CPU);
  if (backend->getBackendName() != "gloo") {
    throw InvalidArgument("process group '" + name + "': its backend for CPUs is " + backend->getBackendName() +
                          ", not gloo");
  }
  return std::make_unique<ProcessGroup>(std::make_unique<GlooTransport>(backend), timeout_s);
}

}  // namespace coterie
