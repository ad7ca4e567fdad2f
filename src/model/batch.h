// The new tokens of several sequences, which run through the model together.
// Legend: T tokens of the batch, L layers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"

namespace coterie {

// The new tokens of one sequence within a batch: rows [first_row, first_row + num_tokens).
struct SequenceChunk {
  int64_t first_row = 0;
  int64_t num_tokens = 0;
  int64_t first_position = 0;     // of the first of them; so many tokens lie in the KV cache already
  int64_t start_length = 0;       // of the sequence, see Batch::add
  std::span<const PagedKv> kv_L;  // with room for the new tokens
};

struct Batch {
  std::vector<int32_t> token_ids_T;
  std::vector<int32_t> positions_T;
  std::vector<SequenceChunk> chunks;

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids_T.size()); }

  // start_length, tokens that the sequence had when it was computed from its start (those of its prompt, as a rule),
  // matters where rotary positions are stretched by the length of the sequence (RopeScalingKind::kDynamic, kLongrope):
  // these tokens turn by all of it, later ones by their own position.
  void add(std::span<const int32_t> token_ids, int64_t first_position, std::span<const PagedKv> kv_L,
           int64_t start_length = 0) {
    chunks.push_back({num_tokens(), static_cast<int64_t>(token_ids.size()), first_position, start_length, kv_L});
    token_ids_T.insert(token_ids_T.end(), token_ids.begin(), token_ids.end());
    for (size_t t = 0; t < token_ids.size(); ++t) positions_T.push_back(static_cast<int32_t>(first_position + t));
  }
};

}  // namespace coterie
