#include "comm/operation.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "base/check.h"
#include "coterie/error.h"

namespace coterie {
namespace {

// A tag is group id, operation and stage. Operations that share a tag, 2^17 apart, can't be mistaken for each other:
// messages of one tag arrive in their order.
constexpr int kStageBits = 2, kOperationBits = 17, kGroupBits = 12;
static_assert(kStageBits + kOperationBits + kGroupBits == 31);

// MPI counts in int.
constexpr int64_t kLargestMessage = int64_t{1} << 30;

// How long one operation sleeps while others may have something to do.
constexpr std::chrono::microseconds kSlice{50};

int tag_of(int group, uint32_t operation, int stage) {
  const uint32_t index = operation & ((1u << kOperationBits) - 1);
  return static_cast<int>((static_cast<uint32_t>(group) << (kOperationBits + kStageBits)) | (index << kStageBits) |
                          static_cast<uint32_t>(stage));
}

std::string seconds_since(CommClock::time_point begin) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", std::chrono::duration<double>(CommClock::now() - begin).count());
  return text;
}

}  // namespace

void CommContext::check() const {
  if (!failure.empty()) throw CommError(failure);
}

void CommContext::progress() {
  // Operations that are done leave the list.
  for (size_t i = 0; i < pending.size();) {
    if (!pending[i]->advance()) ++i;
  }
}

AlignedBuffer CommContext::take_memory(size_t bytes) {
  auto best = free_memory.end();
  for (auto it = free_memory.begin(); it != free_memory.end(); ++it) {
    const bool fits = it->size() >= bytes;
    if (best == free_memory.end()) {
      best = it;
    } else if (const bool best_fits = best->size() >= bytes; fits != best_fits) {
      if (fits) best = it;
    } else if (fits ? it->size() < best->size() : it->size() > best->size()) {
      best = it;
    }
  }
  AlignedBuffer buffer;
  if (best != free_memory.end()) {
    buffer = std::move(*best);
    free_memory.erase(best);
  }
  buffer.reserve(bytes);
  return buffer;
}

Operation::Operation(std::shared_ptr<GroupState> group, const char* name, std::string_view label)
    : group_(std::move(group)), name_(name), label_(label) {
  group_->context->check();
  index_ = group_->operations++;
}

Operation::~Operation() {
  CommContext& context = *group_->context;
  if (!finished_ && context.failure.empty()) {
    // An exception on its way: peers must not write into memory that is about to go.
    context.failure = prefix() + "abandoned";
    context.transport->close();
  }
  finish();
}

void Operation::start() {
  group_->context->pending.push_back(this);
  advance();
}

void Operation::wait() {
  if (finished_) return;
  CommContext& context = *group_->context;
  context.check();
  const CommClock::time_point begin = CommClock::now(), deadline = begin + context.timeout;
  context.wait_begin = begin;
  while (!advance()) {
    // A transport that can't look would hide what the older ones need: they go first.
    const bool can_poll = context.transport->can_poll();
    Operation& next = can_poll ? *this : *context.pending.front();
    const bool alone = !can_poll || context.pending.size() == 1;
    next.wait_for_first_part(alone ? deadline : std::min(deadline, CommClock::now() + kSlice));
    if (CommClock::now() >= deadline && !next.advance()) next.fail_late();
    if (!alone || &next != this) context.progress();
  }
}

bool Operation::done() {
  if (finished_) return true;
  group_->context->check();
  group_->context->progress();
  return finished_;
}

bool Operation::advance() {
  if (finished_) return true;
  while (take_done_parts()) {
    if (!run_stage(++stage_)) {
      finish();
      return true;
    }
  }
  return false;
}

// True when none is left.
bool Operation::take_done_parts() {
  int peer = -1;
  try {
    std::erase_if(parts_, [&](Part& part) {
      peer = part.peer;
      return part.message->done();
    });
  } catch (const TransportError& error) {
    fail_lost(peer, error.what());
  }
  return parts_.empty();
}

void Operation::wait_for_first_part(CommClock::time_point deadline) {
  if (parts_.empty()) return;
  try {
    parts_.front().message->wait(deadline);
  } catch (const TransportError& error) {
    fail_lost(parts_.front().peer, error.what());
  }
}

// Leaves the list and returns the memory.
void Operation::finish() {
  finished_ = true;
  parts_.clear();
  CommContext& context = *group_->context;
  std::erase(context.pending, this);
  for (AlignedBuffer& buffer : memory_) context.free_memory.push_back(std::move(buffer));
  memory_.clear();
}

template <typename Begin>
void Operation::post(int peer, int64_t bytes, Begin&& begin) {
  COTERIE_CHECK(peer != rank() && peer >= 0 && peer < size(), "no message to oneself");
  const int world_rank = group_->world_ranks[static_cast<size_t>(peer)];
  const int tag = tag_of(group_->id, index_, stage_);
  try {
    for (int64_t offset = 0; offset < bytes; offset += kLargestMessage) {
      const auto size = static_cast<size_t>(std::min(kLargestMessage, bytes - offset));
      parts_.push_back({begin(world_rank, tag, offset, size), peer});
    }
  } catch (const TransportError& error) {
    fail_lost(peer, error.what());
  }
}

void Operation::send(int to, const void* data, int64_t bytes) {
  post(to, bytes, [&](int rank, int tag, int64_t offset, size_t size) {
    return group_->context->transport->send(rank, tag, static_cast<const std::byte*>(data) + offset, size);
  });
}

void Operation::receive(int from, void* data, int64_t bytes) {
  post(from, bytes, [&](int rank, int tag, int64_t offset, size_t size) {
    return group_->context->transport->receive(rank, tag, static_cast<std::byte*>(data) + offset, size);
  });
}

std::byte* Operation::scratch(int64_t bytes) {
  memory_.push_back(group_->context->take_memory(static_cast<size_t>(bytes)));
  return memory_.back().as<std::byte>();
}

void Operation::fail_late() {
  std::vector<int> missing;
  const CommClock::time_point now = CommClock::now();
  for (Part& part : parts_) {
    try {
      if (part.message->done() || part.message->wait(now)) continue;
    } catch (const TransportError&) {
      // A transport that gives up on one message gives up on all.
    }
    missing.push_back(part.peer);
  }
  fail(ranks_text(missing) + " did not arrive within " + seconds_since(group_->context->wait_begin));
}

void Operation::fail_lost(int peer, const std::string& reason) {
  fail(ranks_text({peer}) + " is lost after " + seconds_since(group_->context->wait_begin) + ": " + reason);
}

void Operation::fail(const std::string& what) {
  CommContext& context = *group_->context;
  context.failure = prefix() + what;
  std::replace(context.failure.begin(), context.failure.end(), '\n', ' ');
  context.transport->close();
  throw CommError(context.failure);
}

std::string Operation::prefix() const {
  const std::string label = label_.empty() ? "" : " '" + label_ + "'";
  const int rank = group_->context->transport->rank();
  return "rank " + std::to_string(rank) + ", group " + group_->name + ": " + name_ + label + ": ";
}

// "rank 3" or "ranks 1, 3", as the whole run counts them.
std::string Operation::ranks_text(const std::vector<int>& ranks) const {
  std::vector<int> world;
  for (const int r : ranks) world.push_back(group_->world_ranks[static_cast<size_t>(r)]);
  std::sort(world.begin(), world.end());
  world.erase(std::unique(world.begin(), world.end()), world.end());
  std::string text = world.size() == 1 ? "rank" : "ranks";
  for (size_t i = 0; i < world.size(); ++i) text += (i == 0 ? " " : ", ") + std::to_string(world[i]);
  return text;
}

}  // namespace coterie
