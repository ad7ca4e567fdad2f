// Causal attention of the newest tokens of several sequences over their paged KV caches, grouped-query.
// Legend: T new tokens of a sequence, S tokens in its cache (the new ones included), H query heads,
// G KV heads (H a multiple of G), d head_dim.
#pragma once

#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "base/thread_pool.h"

namespace coterie {

// Keys and values of one layer of one sequence. Block b holds tokens [b*block_size, (b+1)*block_size)
// as [G, block_size, d] of dtype kF32, kBF16 or kI8. With kI8 the factors of the rows follow, fp32
// [G, block_size] from the next multiple of 4 bytes on: a value is its integer times its row's factor.
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

// Writes keys and values of the new tokens into the caches. Row t of k and v starts at k + t * token_stride
// and holds [G, d]. A row of kI8 is scaled so that its largest value becomes 127.
void append_kv(std::span<const AttentionChunk> chunks, const float* k, const float* v, int64_t token_stride, int64_t G,
               int64_t d, ThreadPool& pool);

// out[t] = softmax(scale * q[t] K^T, keys up to the token's own position) V. q row t starts at
// q + t * token_stride and holds [H, d]; out_THd is contiguous. The new tokens are in the caches already.
// What a row becomes does not depend on the other rows, nor on where a prompt was cut.
void attention(std::span<const AttentionChunk> chunks, const float* q, int64_t token_stride, int64_t H, int64_t G,
               int64_t d, float scale, float* out_THd, ThreadPool& pool);

}  // namespace coterie
