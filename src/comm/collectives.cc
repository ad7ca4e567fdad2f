#include "comm/collectives.h"

#include <cstring>
#include <string>
#include <vector>

#include "base/check.h"
#include "comm/reduce.h"

namespace coterie {
namespace {

// Up to here an all_reduce sends everything to everybody: one latency instead of two. The sums are the same bits.
constexpr int64_t kDirectBytes = 4096;

void copy(void* to, const void* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<size_t>(bytes));
}

int64_t element_size(DType dtype) {
  COTERIE_CHECK(dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kI64,
                "no reduction of " + std::string(dtype_name(dtype)));
  return static_cast<int64_t>(dtype_size(dtype));
}

// A sum over ranks of one block, of which others send their part into scratch memory.
class Reduction : public Operation {
 protected:
  Reduction(const Group& group, const char* name, std::string_view label, DType dtype, ReduceOp op)
      : Operation(group, name, label), dtype_(dtype), op_(op), element_bytes_(element_size(dtype)) {}

  // Receives the block from all others; `own` is this rank's.
  void receive_parts(const void* own, int64_t count) {
    const int64_t bytes = count * element_bytes_;
    parts_in_rank_order_.assign(static_cast<size_t>(size()), own);
    if (size() == 1) return;
    std::byte* memory = scratch(bytes * (size() - 1));
    for (int step = 1; step < size(); ++step, memory += bytes) {
      parts_in_rank_order_[static_cast<size_t>(peer(step))] = memory;
      receive(peer(step), memory, bytes);
    }
  }

  void reduce_parts(void* out, int64_t count) { reduce(parts_in_rank_order_, out, count, dtype_, op_); }

  DType dtype_;
  ReduceOp op_;
  int64_t element_bytes_;

 private:
  std::vector<const void*> parts_in_rank_order_;
};

class DirectAllReduce final : public Reduction {
 public:
  DirectAllReduce(const Group& group, std::string_view label, void* data, int64_t count, DType dtype, ReduceOp op)
      : Reduction(group, "all_reduce", label, dtype, op), data_(data), count_(count) {}

 private:
  bool run_stage(int stage) override {
    if (stage == 1) {
      reduce_parts(data_, count_);
      return false;
    }
    receive_parts(data_, count_);
    for (int step = 1; step < size(); ++step) send(peer(step), data_, count_ * element_bytes_);
    return true;
  }

  void* data_;
  int64_t count_;
};

// Each rank sums one block for all: reduce_scatter, then all_gather. The least bytes that an all_reduce can send.
class AllReduce final : public Reduction {
 public:
  AllReduce(const Group& group, std::string_view label, void* data, int64_t count, DType dtype, ReduceOp op)
      : Reduction(group, "all_reduce", label, dtype, op), data_(data), count_(count) {}

 private:
  int64_t begin_of(int block) const { return count_ / size() * block + count_ % size() * block / size(); }
  int64_t count_of(int block) const { return begin_of(block + 1) - begin_of(block); }
  std::byte* block(int index) { return at_byte(data_, begin_of(index) * element_bytes_); }

  bool run_stage(int stage) override {
    if (stage == 2) return false;
    if (stage == 0) {
      receive_parts(block(rank()), count_of(rank()));
      for (int step = 1; step < size(); ++step) send_block(peer(step), peer(step));
      return true;
    }
    reduce_parts(block(rank()), count_of(rank()));
    for (int step = 1; step < size(); ++step) {
      const int from = peer(step);
      receive(from, block(from), count_of(from) * element_bytes_);
    }
    for (int step = 1; step < size(); ++step) send_block(peer(step), rank());
    return true;
  }

  void send_block(int to, int index) { send(to, block(index), count_of(index) * element_bytes_); }

  void* data_;
  int64_t count_;
};

class ReduceScatter final : public Reduction {
 public:
  ReduceScatter(const Group& group, std::string_view label, const void* input, void* output, int64_t count, DType dtype,
                ReduceOp op)
      : Reduction(group, "reduce_scatter", label, dtype, op), input_(input), output_(output), count_(count) {}

 private:
  const std::byte* block(int index) const { return at_byte(input_, index * count_ * element_bytes_); }

  bool run_stage(int stage) override {
    if (stage == 1) {
      reduce_parts(output_, count_);
      return false;
    }
    receive_parts(block(rank()), count_);
    for (int step = 1; step < size(); ++step) send(peer(step), block(peer(step)), count_ * element_bytes_);
    return true;
  }

  const void* input_;
  void* output_;
  int64_t count_;
};

// Operations of one stage: what they send and receive is known when they begin.
class OneStage final : public Operation {
 public:
  struct Piece {
    int peer;
    const void* input;
    int64_t send_bytes;
    void* output;
    int64_t receive_bytes;
  };

  OneStage(const Group& group, const char* name, std::string_view label, std::vector<Piece> pieces)
      : Operation(group, name, label), pieces_(std::move(pieces)) {}

 private:
  bool run_stage(int stage) override {
    if (stage == 1) return false;
    for (const Piece& piece : pieces_) receive(piece.peer, piece.output, piece.receive_bytes);
    for (const Piece& piece : pieces_) send(piece.peer, piece.input, piece.send_bytes);
    return true;
  }

  std::vector<Piece> pieces_;
};

class Barrier final : public Operation {
 public:
  Barrier(const Group& group, std::string_view label)
      : Operation(group, "barrier", label), received_(static_cast<size_t>(size())) {}

 private:
  bool run_stage(int stage) override {
    if (stage == 1) return false;
    for (int step = 1; step < size(); ++step) receive(peer(step), &received_[static_cast<size_t>(step)], 1);
    for (int step = 1; step < size(); ++step) send(peer(step), &nothing_, 1);
    return true;
  }

  std::byte nothing_{};
  std::vector<std::byte> received_;
};

// The peers of a rank, each in its own order.
template <typename Visit>
void for_each_peer(const GroupState& group, Visit&& visit) {
  for (int step = 1; step < group.size(); ++step) visit((group.rank + step) % group.size());
}

}  // namespace

Work begin_all_reduce(const Group& group, void* data, int64_t count, DType dtype, ReduceOp op, std::string_view label) {
  COTERIE_CHECK(count >= 0, "all_reduce: negative count");
  if (count * element_size(dtype) <= kDirectBytes) {
    return begin_operation<DirectAllReduce>(group, label, data, count, dtype, op);
  }
  return begin_operation<AllReduce>(group, label, data, count, dtype, op);
}

Work begin_reduce_scatter(const Group& group, const void* input, void* output, int64_t count, DType dtype, ReduceOp op,
                          std::string_view label) {
  COTERIE_CHECK(count >= 0, "reduce_scatter: negative count");
  return begin_operation<ReduceScatter>(group, label, input, output, count, dtype, op);
}

Work begin_all_gather(const Group& group, const void* input, void* output, int64_t bytes, std::string_view label) {
  COTERIE_CHECK(bytes >= 0, "all_gather: negative size");
  copy(at_byte(output, group->rank * bytes), input, bytes);
  std::vector<OneStage::Piece> pieces;
  for_each_peer(*group,
                [&](int peer) { pieces.push_back({peer, input, bytes, at_byte(output, peer * bytes), bytes}); });
  return begin_operation<OneStage>(group, "all_gather", label, std::move(pieces));
}

void check_exchange(const AllToAllV& exchange, int rank, int size) {
  const auto ranks = static_cast<size_t>(size), self = static_cast<size_t>(rank);
  COTERIE_CHECK(exchange.send_bytes.size() == ranks && exchange.send_offsets.size() == ranks &&
                    exchange.receive_bytes.size() == ranks && exchange.receive_offsets.size() == ranks,
                "all_to_all_v: one count and offset per rank");
  for (size_t r = 0; r < ranks; ++r) {
    COTERIE_CHECK(exchange.send_bytes[r] >= 0 && exchange.receive_bytes[r] >= 0, "all_to_all_v: negative count");
  }
  COTERIE_CHECK(exchange.send_bytes[self] == exchange.receive_bytes[self], "all_to_all_v: own block");
}

Work begin_all_to_all_v(const Group& group, const AllToAllV& exchange, std::string_view label) {
  check_exchange(exchange, group->rank, group->size());
  const auto self = static_cast<size_t>(group->rank);
  copy(at_byte(exchange.output, exchange.receive_offsets[self]), at_byte(exchange.input, exchange.send_offsets[self]),
       exchange.send_bytes[self]);
  std::vector<OneStage::Piece> pieces;
  for_each_peer(*group, [&](int peer) {
    const auto p = static_cast<size_t>(peer);
    pieces.push_back({peer, at_byte(exchange.input, exchange.send_offsets[p]), exchange.send_bytes[p],
                      at_byte(exchange.output, exchange.receive_offsets[p]), exchange.receive_bytes[p]});
  });
  return begin_operation<OneStage>(group, "all_to_all_v", label, std::move(pieces));
}

Work begin_broadcast(const Group& group, void* data, int64_t bytes, int root, std::string_view label) {
  COTERIE_CHECK(bytes >= 0 && root >= 0 && root < group->size(), "broadcast: negative size or root out of range");
  std::vector<OneStage::Piece> pieces;
  if (group->rank == root) {
    for_each_peer(*group, [&](int peer) { pieces.push_back({peer, data, bytes, nullptr, 0}); });
  } else {
    pieces.push_back({root, nullptr, 0, data, bytes});
  }
  return begin_operation<OneStage>(group, "broadcast", label, std::move(pieces));
}

Work begin_barrier(const Group& group, std::string_view label) { return begin_operation<Barrier>(group, label); }

}  // namespace coterie
