// Ranks that work together, and the collective operations among them on contiguous host memory.
//
//   Work work = group.start_all_to_all_v(exchange, "layer 3 dispatch");
//   ...                                                   // other work, meanwhile
//   work.wait();
//
// The rules, for every backend (transport.h: ranks as threads, MPI, torch.distributed):
// - Every rank of a group calls the same operations with matching sizes. Over all groups together the order of the
//   starts is the program's, the same on all ranks, whatever the order of the waits.
// - A group and all groups made from it belong to one thread at a time.
// - Memory given to start_*() stays where it is, unread (output) and unwritten (input), until wait() returns or throws;
//   spans of counts and the label are copied. A Work that is destroyed waits first, and keeps an error to itself.
// - Reductions add in rank order: ((x0 + x1) + x2) + ..., bf16 in fp32 and rounded once at the end, int64 modulo 2^64.
//   So results are the same bits on all ranks, from every backend and at any time; they depend on the number of ranks
//   alone. kMax: a NaN wins.
// - wait() and the blocking forms end within timeout_s() of their call. What did not arrive by then, or a peer that is
//   known to be lost, is a CommError of one line:
//     rank 0, group ep2: all_to_all_v 'layer 3 dispatch': ranks 1, 3 did not arrive within 30.0 s
//     rank 0, group ep2: all_to_all_v 'layer 3 dispatch': rank 1 is lost after 0.2 s: Connection closed by peer
//   with the ranks of the whole run (world_rank). Afterwards the group and all its relatives are broken: every further
//   call throws the same line at once, and memory of operations under way may be freed. The process should end.
// - Arguments that can't be right are a std::logic_error (base/check.h).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"

namespace coterie {

class Transport;
class Operation;
struct GroupState;

// Something under way. Move-only; a default one is done.
class Work {
 public:
  Work();
  explicit Work(std::unique_ptr<Operation> operation);
  Work(Work&& other) noexcept;
  Work& operator=(Work&& other) noexcept;  // waits for what was there
  ~Work();

  void wait();  // returns at once when called again
  bool done();  // a look that never blocks; it moves what can be moved. CommError as wait()

 private:
  std::unique_ptr<Operation> operation_;
};

enum class ReduceOp { kSum, kMax };

// What a rank sends to and receives from each rank of a group, itself included; all in bytes, one entry per rank.
// What a sends to b is as long as what b receives from a. Blocks that are received don't overlap.
struct AllToAllV {
  const void* input = nullptr;
  std::span<const int64_t> send_bytes, send_offsets;
  void* output = nullptr;
  std::span<const int64_t> receive_bytes, receive_offsets;
};

class ProcessGroup {
 public:
  // The group of all ranks of a transport, called "world". Every rank calls it; no messages.
  ProcessGroup(std::unique_ptr<Transport> transport, double timeout_s);
  ~ProcessGroup();
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  int rank() const;
  int size() const;
  int world_rank(int rank) const;  // of a rank of this group
  const std::string& name() const;
  std::string_view backend() const;  // "threads", "mpi", "gloo"
  double timeout_s() const;

  // In place: data[count] becomes the sum (or maximum) of every rank's. fp32, bf16, int64.
  Work start_all_reduce(void* data, int64_t count, DType dtype, ReduceOp op, std::string_view label);
  // input[size * count] -> output[count]: of the sum, rank r gets block r. output may be block `rank` of input (the
  // rest of input is left alone), else they don't overlap.
  Work start_reduce_scatter(const void* input, void* output, int64_t count, DType dtype, ReduceOp op,
                            std::string_view label);
  // input[bytes] -> output[size * bytes], in rank order. input may be block `rank` of output, else they don't overlap.
  Work start_all_gather(const void* input, void* output, int64_t bytes, std::string_view label);
  Work start_all_to_all_v(const AllToAllV& exchange, std::string_view label);
  // data[bytes] of rank `root` goes to all.
  Work start_broadcast(void* data, int64_t bytes, int root, std::string_view label);
  // Done when every rank has started it.
  Work start_barrier(std::string_view label);

  void all_reduce(void* data, int64_t count, DType dtype, ReduceOp op, std::string_view label);
  void reduce_scatter(const void* input, void* output, int64_t count, DType dtype, ReduceOp op, std::string_view label);
  void all_gather(const void* input, void* output, int64_t bytes, std::string_view label);
  void all_to_all_v(const AllToAllV& exchange, std::string_view label);
  void broadcast(void* data, int64_t bytes, int root, std::string_view label);
  void barrier(std::string_view label);

  // Collective over this group: ranks of the same color form a group, in the order of (key, rank); nullptr for a
  // negative color. A run has room for 4095 calls (ResourceExhausted).
  std::unique_ptr<ProcessGroup> split(int color, int key, const std::string& name);
  // Collective over this group: the group of these ranks of it, in this order; nullptr for the others.
  std::unique_ptr<ProcessGroup> subgroup(std::span<const int> ranks, const std::string& name);

  // The good end of a run: a barrier, then the backend's farewell. Called on the world, by all
  // ranks; every later call is a CommError. Without it MPI takes the end of a process for a crash, and stops the others
  // at once, which is right after an exception.
  void finish();

  // Moves operations under way, without blocking. Backends without a thread of their own (MPI) move large messages only
  // inside calls: long computations that are to hide an operation call it now and then (it costs under 1 us).
  void progress();

 private:
  friend class AllToAll;
  explicit ProcessGroup(std::shared_ptr<GroupState> state);

  std::shared_ptr<GroupState> state_;
};

}  // namespace coterie
