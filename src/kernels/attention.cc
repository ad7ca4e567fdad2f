// Attention by (block of new tokens, KV head) tasks. A task walks the keys in runs of kRunKeys at fixed
// absolute positions, brings each run into fp32 scratch once, and lets every query of its tokens and
// heads attend to as much of the run as lies in its past. A query thus sees the same runs in the same
// order however the prompt was cut.
#include "kernels/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/workspace.h"

namespace coterie {
namespace {

// Keys and values of a run fill half of an L1 cache at head_dim 64, and stay in L2 at any size.
constexpr int64_t kRunKeys = 64;
// Tokens of a task: amortizes bringing a run in over many queries.
constexpr int64_t kTokensPerTask = 32;
constexpr int64_t kPadding = 16;  // AttendStep wants multiples of this

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Call {
  const float* q;
  int64_t token_stride;
  const PagedKv& kv;
  int64_t T, S, H, G, d;
  float scale;
  float* out_THd;

  int64_t padded_d() const { return round_up(d, kPadding); }
  int64_t heads_per_group() const { return H / G; }
};

// A thread's memory. Columns from d on and rows after the last key are zero: they take part in the
// arithmetic, with no effect.
struct Scratch {
  float *keys, *values, *queries, *outs, *scores, *maxima, *sums;

  static size_t floats(const Call& call) {
    const auto d = static_cast<size_t>(call.padded_d());
    const auto queries = static_cast<size_t>(kTokensPerTask * call.heads_per_group());
    return 2 * kRunKeys * d + 2 * queries * d + kRunKeys +
           2 * static_cast<size_t>(round_up(static_cast<int64_t>(queries), 16));
  }
  Scratch(float* memory, const Call& call) {
    const int64_t d = call.padded_d(), queries_count = kTokensPerTask * call.heads_per_group();
    keys = memory;
    values = keys + kRunKeys * d;
    queries = values + kRunKeys * d;
    outs = queries + queries_count * d;
    scores = outs + queries_count * d;
    maxima = scores + kRunKeys;
    sums = maxima + round_up(queries_count, 16);
  }
};

const char* cache_row(void* const* blocks, const PagedKv& kv, int64_t position, int64_t g, int64_t d) {
  const auto* block = static_cast<const char*>(blocks[position / kv.block_size]);
  const int64_t row = g * kv.block_size + position % kv.block_size;
  return block + row * d * static_cast<int64_t>(dtype_size(kv.dtype));
}

// Positions [first, first + n) of one head, then zero rows up to a multiple of kPadding.
void load_run(const Call& call, void* const* blocks, int64_t g, int64_t first, int64_t n, float* rows) {
  const KernelTable& kernels = active_kernels();
  const int64_t d = call.padded_d();
  for (int64_t j = 0; j < n; ++j) {
    const char* row = cache_row(blocks, call.kv, first + j, g, call.d);
    kernels.convert_row(row, call.kv.dtype, rows + j * d, DType::kF32, call.d);
    std::fill(rows + j * d + call.d, rows + (j + 1) * d, 0.0f);
  }
  std::fill(rows + n * d, rows + round_up(n, kPadding) * d, 0.0f);
}

void load_queries(const Call& call, int64_t g, int64_t first_token, int64_t tokens, const Scratch& scratch) {
  const int64_t d = call.padded_d(), R = call.heads_per_group();
  for (int64_t i = 0; i < tokens * R; ++i) {
    const float* q = call.q + (first_token + i / R) * call.token_stride + (g * R + i % R) * call.d;
    std::copy(q, q + call.d, scratch.queries + i * d);
    std::fill(scratch.queries + i * d + call.d, scratch.queries + (i + 1) * d, 0.0f);
  }
  std::fill(scratch.outs, scratch.outs + tokens * R * d, 0.0f);
  std::fill(scratch.maxima, scratch.maxima + tokens * R, -std::numeric_limits<float>::infinity());
  std::fill(scratch.sums, scratch.sums + tokens * R, 0.0f);
}

void store_outs(const Call& call, int64_t g, int64_t first_token, int64_t tokens, const Scratch& scratch) {
  const int64_t d = call.padded_d(), R = call.heads_per_group();
  for (int64_t i = 0; i < tokens * R; ++i) {
    float* out = call.out_THd + ((first_token + i / R) * call.H + g * R + i % R) * call.d;
    active_kernels().scale_row(scratch.outs + i * d, DType::kF32, 1.0f / scratch.sums[i], out, DType::kF32, call.d);
  }
}

void attend_tokens(const Call& call, int64_t g, int64_t first_token, int64_t tokens, const Scratch& scratch) {
  const KernelTable& kernels = active_kernels();
  const int64_t d = call.padded_d(), R = call.heads_per_group();
  const int64_t first_position = call.S - call.T + first_token, end = first_position + tokens;
  load_queries(call, g, first_token, tokens, scratch);
  for (int64_t run = 0; run < end; run += kRunKeys) {
    const int64_t n = std::min(kRunKeys, end - run);
    load_run(call, call.kv.k_blocks, g, run, n, scratch.keys);
    load_run(call, call.kv.v_blocks, g, run, n, scratch.values);
    for (int64_t i = 0; i < tokens * R; ++i) {
      const int64_t visible = std::min(n, first_position + i / R + 1 - run);
      if (visible <= 0) continue;
      kernels.attend({scratch.queries + i * d, scratch.keys, scratch.values, visible, d, call.scale, scratch.scores,
                      scratch.maxima + i, scratch.sums + i, scratch.outs + i * d});
    }
  }
  store_outs(call, g, first_token, tokens, scratch);
}

}  // namespace

void append_kv(const PagedKv& kv, const float* k, const float* v, int64_t token_stride, int64_t first_position,
               int64_t T, int64_t G, int64_t d) {
  const KernelTable& kernels = active_kernels();
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t g = 0; g < G; ++g) {
      char* k_row = const_cast<char*>(cache_row(kv.k_blocks, kv, first_position + t, g, d));
      char* v_row = const_cast<char*>(cache_row(kv.v_blocks, kv, first_position + t, g, d));
      kernels.convert_row(k + t * token_stride + g * d, DType::kF32, k_row, kv.dtype, d);
      kernels.convert_row(v + t * token_stride + g * d, DType::kF32, v_row, kv.dtype, d);
    }
  }
}

void attention(const float* q, int64_t token_stride, const PagedKv& kv, int64_t T, int64_t S, int64_t H, int64_t G,
               int64_t d, float scale, float* out_THd, ThreadPool& pool) {
  COTERIE_CHECK(G > 0 && H % G == 0 && T <= S, "heads or lengths do not fit");
  const Call call = {q, token_stride, kv, T, S, H, G, d, scale, out_THd};
  static thread_local Workspace workspace;
  const size_t floats = Scratch::floats(call);
  workspace.reserve(Workspace::padded(floats * 4 * static_cast<size_t>(pool.num_threads())));
  float* const memory = workspace.take<float>(floats * static_cast<size_t>(pool.num_threads()));
  const int64_t blocks = (T + kTokensPerTask - 1) / kTokensPerTask;
  pool.run(blocks * G, [&](int64_t task, int thread) {
    const Scratch scratch(memory + static_cast<size_t>(thread) * floats, call);
    // The last tokens see the most keys: they go first, so that no long task is left for the end.
    const int64_t first = (blocks - 1 - task / G) * kTokensPerTask;
    attend_tokens(call, task % G, first, std::min(kTokensPerTask, T - first), scratch);
  });
}

}  // namespace coterie
