// A collective operation as a sequence of stages. A stage is a set of messages; when all of them are done, the
// operation computes and begins the next one. Inside src/comm only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "comm/transport.h"

namespace coterie {

class Operation;

// What a group and all its relatives share.
struct CommContext {
  std::unique_ptr<Transport> transport;
  CommClock::duration timeout;
  int next_group_id = 1;
  CommClock::time_point wait_begin = CommClock::now();  // of the last wait; of the group before the first
  std::string failure;                                  // why nothing works any more; empty while all is well
  std::vector<Operation*> pending;                      // in the order of their starts
  std::vector<AlignedBuffer> free_memory;               // fresh memory costs more than a message of its size

  void check() const;  // CommError after a failure
  void progress();     // moves every pending operation
  AlignedBuffer take_memory(size_t bytes);
};

struct GroupState {
  std::shared_ptr<CommContext> context;
  std::vector<int> world_ranks;
  int rank = 0;
  int id = 0;               // part of every tag: the same on all ranks, and of no other group of theirs
  uint32_t operations = 0;  // started so far; part of every tag
  std::string name;

  int size() const { return static_cast<int>(world_ranks.size()); }
};

class Operation {
 public:
  // `name` outlives everything (a literal). CommError when the group is broken already.
  Operation(std::shared_ptr<GroupState> group, const char* name, std::string_view label);
  virtual ~Operation();  // breaks the group when it is not done: Work waits before
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  void start();  // begins the first stage
  void wait();
  bool done();     // looks, and moves everything that is pending
  bool advance();  // moves this one alone; true when it is done

 protected:
  // Computes what the messages that are done allow, and begins those of stage 0, 1, ...; false after the last.
  virtual bool run_stage(int stage) = 0;

  // Messages of the stage that begins. Receives first: a message that finds its receiver needs no intermediate memory.
  void send(int to, const void* data, int64_t bytes);
  void receive(int from, void* data, int64_t bytes);
  // Memory that lives as long as the operation.
  std::byte* scratch(int64_t bytes);

  int rank() const { return group_->rank; }
  int size() const { return group_->size(); }
  // The other ranks, each rank's own order: nobody is everybody's first.
  int peer(int step) const { return (rank() + step) % size(); }

 private:
  struct Part {
    std::unique_ptr<Message> message;
    int peer;
  };

  template <typename Begin>
  void post(int peer, int64_t bytes, Begin&& begin);
  bool take_done_parts();
  void finish();
  void wait_for_first_part(CommClock::time_point deadline);
  [[noreturn]] void fail_late();
  [[noreturn]] void fail_lost(int peer, const std::string& reason);
  [[noreturn]] void fail(const std::string& what);
  std::string prefix() const;
  std::string ranks_text(const std::vector<int>& ranks) const;

  std::shared_ptr<GroupState> group_;
  const char* name_;
  std::string label_;
  uint32_t index_;  // of the operation in its group
  int stage_ = -1;
  bool finished_ = false;
  std::vector<Part> parts_;  // of this stage, not known to be done
  std::vector<AlignedBuffer> memory_;
};

}  // namespace coterie
