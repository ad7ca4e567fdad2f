// For tests of operations: numbers that every rank can make of every other one, and exchanges with their results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "comm/process_group.h"

namespace coterie {

inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Values of both signs and of many magnitudes, so that sums in another order have other bits.
inline std::vector<float> random_floats(int seed, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = mixed(static_cast<uint32_t>(seed) * 1000003u + static_cast<uint32_t>(i));
    values[i] = static_cast<float>(static_cast<int32_t>(bits)) * (bits % 3 == 0 ? 1e-6f : 1e-9f);
  }
  return values;
}

// An all_to_all_v of bytes(from, to) bytes, each rank's blocks with gaps before them; `expected` is what a loop over
// the senders puts into `output`, gaps included.
using BytesBetween = std::function<int64_t(int from, int to)>;

struct UnevenExchange {
  UnevenExchange(int rank, int size, const BytesBetween& bytes, int64_t gap = 3) : gap_(gap) {
    for (int r = 0; r < size; ++r) {
      append(send_bytes, send_offsets, input, bytes(rank, r), rank, r);
      append(receive_bytes, receive_offsets, expected, bytes(r, rank), r, rank);
    }
    output.resize(expected.size());
  }

  AllToAllV arguments() {
    return {input.data(), send_bytes, send_offsets, output.data(), receive_bytes, receive_offsets};
  }

  std::vector<int64_t> send_bytes, send_offsets, receive_bytes, receive_offsets;
  std::vector<std::byte> input, output, expected;

 private:
  void append(std::vector<int64_t>& counts, std::vector<int64_t>& offsets, std::vector<std::byte>& memory,
              int64_t bytes, int from, int to) {
    memory.resize(memory.size() + static_cast<size_t>(gap_));
    counts.push_back(bytes);
    offsets.push_back(static_cast<int64_t>(memory.size()));
    for (int64_t i = 0; i < bytes; ++i) {
      const auto seed = static_cast<uint32_t>(from * 1009 + to) * 65537u + static_cast<uint32_t>(i);
      memory.push_back(static_cast<std::byte>(mixed(seed)));
    }
  }

  int64_t gap_;
};

}  // namespace coterie
