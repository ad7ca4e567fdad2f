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
// [b*block_size, (b+1)*block_size) as KvBlock says.
struct PagedKv {
  void* const* blocks = nullptr;
  DType dtype = DType::kF32;
  int64_t block_size = 0;
  bool has_values = true;  // else a token's values are the first v elements of its key, as in latent attention
};

// Where things lie in a block, in bytes. One KV head behind the other: its keys [block_size, d] and its values
// [block_size, v] (v = 0: none), as attention reads them. With kI8, behind all heads, the factors of a head's rows of
// keys and of values, fp32 [block_size] each, one head behind the other: an element is its integer times its row's
// factor. (Between the heads they made attention read a sixth slower, as measured.)
class KvBlock {
 public:
  KvBlock(DType dtype, int64_t block_size, int64_t G, int64_t d, int64_t v);

  int64_t keys(int64_t g) const { return g * head_bytes_; }
  int64_t values(int64_t g) const { return g * head_bytes_ + key_bytes_; }
  int64_t key_factors(int64_t g) const { return first_factor_ + g * head_factor_bytes_; }
  int64_t value_factors(int64_t g) const { return key_factors(g) + factor_bytes_; }
  int64_t bytes() const { return bytes_; }  // a multiple of 4

 private:
  int64_t key_bytes_, head_bytes_;
  int64_t factor_bytes_, head_factor_bytes_, first_factor_;  // of keys; of keys and values; where they begin
  int64_t bytes_;
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
