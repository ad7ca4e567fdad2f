// Causal attention of the newest tokens of several sequences over their paged KV caches, grouped-query.
// Legend: T new tokens of a sequence, S tokens in its cache (the new ones included), H query heads,
// G KV heads (H a multiple of G), d head_dim of queries and keys, v of values.
#pragma once

#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "base/thread_pool.h"

namespace coterie {

// Keys and values of one layer of one sequence, of dtype kF32, kBF16 or kI8. Block b holds tokens
// [b*block_size, (b+1)*block_size), one KV head (KvHead) behind the other.
struct PagedKv {
  void* const* blocks = nullptr;
  DType dtype = DType::kF32;
  int64_t block_size = 0;
  bool has_values = true;  // else a token's values are the first v elements of its key, as in latent attention
};

// A head in a block: its keys [block_size, d], its values [block_size, v] (v = 0: none), and with kI8, from the next
// multiple of 4 bytes on, the factors of the keys' rows and of the values', fp32 [block_size] each: an element is its
// integer times its row's factor. What attention reads one after the other lies so. In bytes from the first key on.
struct KvHead {
  KvHead(DType dtype, int64_t block_size, int64_t d, int64_t v);

  int64_t values, key_factors, value_factors, size;
};

// The new tokens of one sequence: rows [first_row, first_row + T) of what a call is given, the last T of S.
struct AttentionChunk {
  PagedKv kv;
  int64_t first_row = 0;
  int64_t T = 0;
  int64_t S = 0;
};

struct AttentionShape {
  int64_t H = 0, G = 0, d = 0;
  int64_t v = 0;  // at most d where keys hold the values
  float scale = 1.0f;
  int64_t window = 0;              // a token sees so many keys, its own the last of them; 0: all up to its own
  const float* sinks_H = nullptr;  // scores of a key without value, one per head, that takes part in every softmax
};

// Writes keys and values of the new tokens into the caches. k_TGd and values_TGv (null where keys hold
// the values) are contiguous. A row of kI8 is scaled so that its largest value becomes 127.
void append_kv(std::span<const AttentionChunk> chunks, const float* k_TGd, const float* values_TGv,
               const AttentionShape& shape, ThreadPool& pool);

// out[t] = softmax(scale * q[t] K^T, over the keys that the token sees and the sink) V. q_THd and out_THv are
// contiguous. The new tokens are in the caches already. Beside a cache in bf16, queries and weights are rounded to
// bf16; beside one in kI8, to integers of 16 bits. What a row becomes does not depend on the other rows, nor on where a
// prompt was cut.
void attention(std::span<const AttentionChunk> chunks, const float* q_THd, const AttentionShape& shape, float* out_THv,
               ThreadPool& pool);

}  // namespace coterie
