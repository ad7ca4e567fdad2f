#include "comm/process_group.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "comm/collectives.h"
#include "comm/operation.h"
#include "coterie/error.h"

namespace coterie {
namespace {

// 12 bits of a tag; 0 is the world.
constexpr int64_t kMostGroups = 4096;

}  // namespace

Work::Work() = default;
Work::Work(std::unique_ptr<Operation> operation) : operation_(std::move(operation)) {}
Work::Work(Work&& other) noexcept = default;

Work& Work::operator=(Work&& other) noexcept {
  Work old(std::exchange(operation_, std::move(other.operation_)));
  return *this;
}

Work::~Work() {
  try {
    wait();
  } catch (const std::exception&) {
    // Whoever wanted to know would have waited.
  }
}

void Work::wait() {
  if (operation_) operation_->wait();
}

bool Work::done() { return !operation_ || operation_->done(); }

ProcessGroup::ProcessGroup(std::unique_ptr<Transport> transport, double timeout_s) {
  if (!(timeout_s > 0)) throw InvalidArgument("comm.timeout_s: must be positive (" + std::to_string(timeout_s) + ")");
  state_ = std::make_shared<GroupState>();
  state_->rank = transport->rank();
  state_->world_ranks.resize(static_cast<size_t>(transport->size()));
  std::iota(state_->world_ranks.begin(), state_->world_ranks.end(), 0);
  state_->name = "world";
  state_->context = std::make_shared<CommContext>();
  state_->context->transport = std::move(transport);
  state_->context->timeout =
      std::chrono::duration_cast<CommClock::duration>(std::chrono::duration<double>(std::min(timeout_s, 1e8)));
}

ProcessGroup::ProcessGroup(std::shared_ptr<GroupState> state) : state_(std::move(state)) {}
ProcessGroup::~ProcessGroup() = default;

int ProcessGroup::rank() const { return state_->rank; }
int ProcessGroup::size() const { return state_->size(); }
int ProcessGroup::world_rank(int rank) const { return state_->world_ranks.at(static_cast<size_t>(rank)); }
const std::string& ProcessGroup::name() const { return state_->name; }
std::string_view ProcessGroup::backend() const { return state_->context->transport->name(); }
double ProcessGroup::timeout_s() const { return std::chrono::duration<double>(state_->context->timeout).count(); }

Work ProcessGroup::start_all_reduce(void* data, int64_t count, DType dtype, ReduceOp op, std::string_view label) {
  return begin_all_reduce(state_, data, count, dtype, op, label);
}

Work ProcessGroup::start_reduce_scatter(const void* input, void* output, int64_t count, DType dtype, ReduceOp op,
                                        std::string_view label) {
  return begin_reduce_scatter(state_, input, output, count, dtype, op, label);
}

Work ProcessGroup::start_all_gather(const void* input, void* output, int64_t bytes, std::string_view label) {
  return begin_all_gather(state_, input, output, bytes, label);
}

Work ProcessGroup::start_all_to_all_v(const AllToAllV& exchange, std::string_view label) {
  return begin_all_to_all_v(state_, exchange, label);
}

Work ProcessGroup::start_broadcast(void* data, int64_t bytes, int root, std::string_view label) {
  return begin_broadcast(state_, data, bytes, root, label);
}

Work ProcessGroup::start_barrier(std::string_view label) { return begin_barrier(state_, label); }

void ProcessGroup::all_reduce(void* data, int64_t count, DType dtype, ReduceOp op, std::string_view label) {
  start_all_reduce(data, count, dtype, op, label).wait();
}

void ProcessGroup::reduce_scatter(const void* input, void* output, int64_t count, DType dtype, ReduceOp op,
                                  std::string_view label) {
  start_reduce_scatter(input, output, count, dtype, op, label).wait();
}

void ProcessGroup::all_gather(const void* input, void* output, int64_t bytes, std::string_view label) {
  start_all_gather(input, output, bytes, label).wait();
}

void ProcessGroup::all_to_all_v(const AllToAllV& exchange, std::string_view label) {
  start_all_to_all_v(exchange, label).wait();
}

void ProcessGroup::broadcast(void* data, int64_t bytes, int root, std::string_view label) {
  start_broadcast(data, bytes, root, label).wait();
}

void ProcessGroup::barrier(std::string_view label) { start_barrier(label).wait(); }

std::unique_ptr<ProcessGroup> ProcessGroup::split(int color, int key, const std::string& name) {
  CommContext& context = *state_->context;
  struct Entry {
    int64_t color, key, next_group_id;
  };
  const Entry own{color, key, context.next_group_id};
  std::vector<Entry> entries(static_cast<size_t>(size()));
  all_gather(&own, entries.data(), sizeof own, "make group " + name);
  // No two groups that share two ranks share an id: both of them took part in giving out both.
  const auto by_id = [](const Entry& a, const Entry& b) { return a.next_group_id < b.next_group_id; };
  const int64_t id = std::max_element(entries.begin(), entries.end(), by_id)->next_group_id;
  if (id >= kMostGroups) throw ResourceExhausted("group " + name + ": a run has room for 4095 groups");
  context.next_group_id = static_cast<int>(id) + 1;
  if (color < 0) return nullptr;

  std::vector<int> members;
  for (int r = 0; r < size(); ++r) {
    if (entries[static_cast<size_t>(r)].color == color) members.push_back(r);
  }
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
    return entries[static_cast<size_t>(a)].key < entries[static_cast<size_t>(b)].key;
  });
  auto state = std::make_shared<GroupState>();
  state->context = state_->context;
  state->id = static_cast<int>(id);
  state->name = name;
  for (const int member : members) {
    if (member == rank()) state->rank = static_cast<int>(state->world_ranks.size());
    state->world_ranks.push_back(world_rank(member));
  }
  return std::unique_ptr<ProcessGroup>(new ProcessGroup(std::move(state)));
}

std::unique_ptr<ProcessGroup> ProcessGroup::subgroup(std::span<const int> ranks, const std::string& name) {
  std::vector<bool> seen(static_cast<size_t>(size()));
  int key = -1;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int member = ranks[i];
    COTERIE_CHECK(member >= 0 && member < size() && !seen[static_cast<size_t>(member)],
                  "group " + name + ": rank " + std::to_string(member) + " is out of range or there twice");
    seen[static_cast<size_t>(member)] = true;
    if (member == rank()) key = static_cast<int>(i);
  }
  return split(key < 0 ? -1 : 0, key, name);
}

void ProcessGroup::finish() {
  CommContext& context = *state_->context;
  COTERIE_CHECK(state_->id == 0, "finish: group " + name() + " is not the world");
  barrier("finish");
  COTERIE_CHECK(context.pending.empty(), "finish: operations are under way");
  context.failure = "rank " + std::to_string(rank()) + ", group world: has finished";
  context.transport->finish();
}

void ProcessGroup::progress() {
  state_->context->check();
  state_->context->progress();
}

}  // namespace coterie
