// The step that all kinds of attention share: new keys and values go into the cache, new queries attend to it.
#pragma once

#include "base/thread_pool.h"
#include "kernels/attention.h"
#include "model/batch.h"

namespace coterie {

// Of one layer, all chunks of the batch at once. Legend as in kernels/attention.h: q_THd, k_TGd, values_TGv (null where
// keys hold the values) and out_THv are rows of the whole batch.
void attend_to_cache(const Batch& batch, int64_t layer, const float* q_THd, const float* k_TGd, const float* values_TGv,
                     const AttentionShape& shape, float* out_THv, ThreadPool& pool);

}  // namespace coterie
