// Causal attention of the newest tokens of several sequences over their paged KV caches, grouped-query.
// Legend: T new tokens of a sequence, S tokens in its cache (the new ones included), H query heads,
// G KV heads (H a multiple of G), d head_dim of queries and keys, v of values.
#pragma once

#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "base/thread_pool.h"

namespace coterie {

// Keys and values of one layer of one sequence. Block b holds tokens [b*block_size, (b+1)*block_size)
// as [G, block_size, d] (values: v) of dtype kF32, kBF16 or kI8. With kI8 the factors of the rows follow, fp32
// [G, block_size] from the next multiple of 4 bytes on: a value is its integer times its row's factor.
// Without v_blocks a token's values are the first v elements of its key, as in latent attention.
struct PagedKv {
  void* const* k_blocks = nullptr;
  void* const* v_blocks = nullptr;
  DType dtype = DType::kF32;
  int64_t block_size = 0;
};

// Bytes of a block of keys, or of values.
int64_t kv_block_bytes(DType dtype, int64_t block_size, int64_t G, int64_t d);

// The new tokens of one sequence: rows [first_row, first_row + T) of what a call is given, the last T of S.
struct AttentionChunk {
  PagedKv kv;
  int64_t first_row = 0;
  int64_t T = 0;
  int64_t S = 0;
};

struct AttentionShape {
  int64_t H = 0, G = 0, d = 0;
  int64_t v = 0;  // at most d without v_blocks
  float scale = 1.0f;
  int64_t window = 0;              // a token sees so many keys, its own the last of them; 0: all up to its own
  const float* sinks_H = nullptr;  // scores of a key without value, one per head, that takes part in every softmax
};

// Writes keys and values of the new tokens into the caches. k_TGd and values_TGv (null without v_blocks) are
// contiguous. A row of kI8 is scaled so that its largest value becomes 127.
void append_kv(std::span<const AttentionChunk> chunks, const float* k_TGd, const float* values_TGv,
               const AttentionShape& shape, ThreadPool& pool);

// out[t] = softmax(scale * q[t] K^T, over the keys that the token sees and the sink) V. q_THd and out_THv are
// contiguous. The new tokens are in the caches already. Beside a cache in bf16, queries and weights are rounded to
// bf16; beside one in kI8, to integers of 16 bits. What a row becomes does not depend on the other rows, nor on where a
// prompt was cut.
void attention(std::span<const AttentionChunk> chunks, const float* q_THd, const AttentionShape& shape, float* out_THv,
               ThreadPool& pool);

}  // namespace coterie
