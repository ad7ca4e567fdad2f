// From routed rows back to tokens. Legend as in moe/dispatcher.h.
#pragma once

#include "base/thread_pool.h"
#include "kernels/matrix.h"
#include "moe/dispatcher.h"

namespace coterie {

inline constexpr int64_t kMostChoices = 256;  // of one token; models in use have at most 22

// out[t] = sum over the choices of t of weight * rows[its row], in the order of the choices and in fp32;
// zeros when all were dropped. With unweighted, every weight counts as 1; with accumulate, what is in out (fp32) comes
// first in the sum.
void combine(const Dispatch& dispatch, const float* rows_RD, bool unweighted, const Matrix& out_TD, ThreadPool& pool,
             bool accumulate = false);

// True when rows are tokens one to one and in order, with weight 1: then combine would only copy.
bool is_identity(const Dispatch& dispatch);

}  // namespace coterie
