// The collective operations as stages of messages. Every rank sends directly to every other one: a message that is
// missing then names the rank that is, and results don't depend on a tree's shape. Inside src/comm only; the functions
// mean what ProcessGroup says of them.
#pragma once

#include <memory>
#include <string_view>

#include "comm/operation.h"
#include "comm/process_group.h"

namespace coterie {

using Group = std::shared_ptr<GroupState>;

Work begin_all_reduce(const Group& group, void* data, int64_t count, DType dtype, ReduceOp op, std::string_view label);
Work begin_reduce_scatter(const Group& group, const void* input, void* output, int64_t count, DType dtype, ReduceOp op,
                          std::string_view label);
Work begin_all_gather(const Group& group, const void* input, void* output, int64_t bytes, std::string_view label);
Work begin_all_to_all_v(const Group& group, const AllToAllV& exchange, std::string_view label);
Work begin_broadcast(const Group& group, void* data, int64_t bytes, int root, std::string_view label);
Work begin_barrier(const Group& group, std::string_view label);

// An operation that has begun.
template <typename Op, typename... Arguments>
Work begin_operation(Arguments&&... arguments) {
  auto operation = std::make_unique<Op>(std::forward<Arguments>(arguments)...);
  operation->start();
  return Work(std::move(operation));
}

// The checks of all_to_all_v's arguments, for a group of this size.
void check_exchange(const AllToAllV& exchange, int rank, int size);

inline const std::byte* at_byte(const void* data, int64_t offset) {
  return static_cast<const std::byte*>(data) + offset;
}
inline std::byte* at_byte(void* data, int64_t offset) { return static_cast<std::byte*>(data) + offset; }

}  // namespace coterie
