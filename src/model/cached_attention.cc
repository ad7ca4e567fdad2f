#include "model/cached_attention.h"

#include <vector>

namespace coterie {

void attend_to_cache(const Batch& batch, int64_t layer, const float* q_THd, const float* k_TGd, const float* values_TGv,
                     const AttentionShape& shape, float* out_THv, ThreadPool& pool) {
  std::vector<AttentionChunk> chunks;
  for (const SequenceChunk& chunk : batch.chunks) {
    chunks.push_back({chunk.kv_L[layer], chunk.first_row, chunk.num_tokens, chunk.first_position + chunk.num_tokens});
  }
  append_kv(chunks, k_TGd, values_TGv, shape, pool);
  attention(chunks, q_THd, shape, out_THv, pool);
}

}  // namespace coterie
