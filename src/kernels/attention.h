// Causal attention of the newest T tokens of one sequence over its paged KV cache, grouped-query.
// Legend: T new tokens, S tokens in the cache (the new ones included), H query heads, G KV heads
// (H a multiple of G), d head_dim.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/thread_pool.h"

namespace coterie {

// Keys and values of one layer of one sequence. Block b holds tokens [b*block_size, (b+1)*block_size)
// as [G, block_size, d] of dtype kF32 or kBF16.
struct PagedKv {
  void* const* k_blocks = nullptr;
  void* const* v_blocks = nullptr;
  DType dtype = DType::kF32;
  int64_t block_size = 0;
};

// Writes keys and values of T tokens at positions first_position, first_position + 1, ... Row t of
// k and v starts at k + t * token_stride and holds [G, d].
void append_kv(const PagedKv& kv, const float* k, const float* v, int64_t token_stride, int64_t first_position,
               int64_t T, int64_t G, int64_t d);

// out[t] = softmax(scale * q[t] K^T, keys up to the token's own position) V. q row t starts at
// q + t * token_stride and holds [H, d]; out_THd is contiguous. The new tokens are the last T of S
// and are in the cache already.
void attention(const float* q, int64_t token_stride, const PagedKv& kv, int64_t T, int64_t S, int64_t H, int64_t G,
               int64_t d, float scale, float* out_THd, ThreadPool& pool);

}  // namespace coterie
