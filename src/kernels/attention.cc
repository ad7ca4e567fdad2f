// Attention by (block of a sequence's new tokens, KV head) tasks. A task walks the keys in runs of kRunKeys at fixed
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
#include "kernels/parallel_rows.h"
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
  int64_t H, G, d;
  float scale;
  float* out_THd;

  int64_t padded_d() const { return round_up(d, kPadding); }
  int64_t heads_per_group() const { return H / G; }
};

// Tokens [first, first + count) of a chunk.
struct TokenBlock {
  const AttentionChunk* chunk;
  int64_t first, count;

  int64_t row() const { return chunk->first_row + first; }
  int64_t position() const { return chunk->S - chunk->T + first; }
};

// The last tokens see the most keys: they go first, so that no long task is left for the end.
std::vector<TokenBlock> token_blocks(std::span<const AttentionChunk> chunks) {
  std::vector<TokenBlock> blocks;
  for (const AttentionChunk& chunk : chunks) {
    for (int64_t end = chunk.T; end > 0;) {
      const int64_t first = (end - 1) / kTokensPerTask * kTokensPerTask;
      blocks.push_back({&chunk, first, end - first});
      end = first;
    }
  }
  return blocks;
}

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

// One row of a block, and its factor where the type has one.
struct CacheRow {
  char* data;
  float* factor;
};

int64_t values_bytes(DType dtype, int64_t block_size, int64_t G, int64_t d) {
  return round_up(G * block_size * d * static_cast<int64_t>(dtype_size(dtype)), sizeof(float));
}

CacheRow cache_row(void* const* blocks, const PagedKv& kv, int64_t position, int64_t g, int64_t G, int64_t d) {
  auto* const block = static_cast<char*>(blocks[position / kv.block_size]);
  const int64_t row = g * kv.block_size + position % kv.block_size;
  auto* const factors = reinterpret_cast<float*>(block + values_bytes(kv.dtype, kv.block_size, G, d));
  return {block + row * d * static_cast<int64_t>(dtype_size(kv.dtype)), factors + row};
}

void store_cache_row(const float* values, DType dtype, int64_t d, const CacheRow& row) {
  const KernelTable& kernels = active_kernels();
  if (dtype == DType::kI8) {
    *row.factor = kernels.quantize_row(values, d, reinterpret_cast<int8_t*>(row.data));
  } else {
    kernels.convert_row(values, DType::kF32, row.data, dtype, d);
  }
}

void load_cache_row(const CacheRow& row, DType dtype, int64_t d, float* values) {
  const KernelTable& kernels = active_kernels();
  if (dtype == DType::kI8) {
    kernels.dequantize_row(reinterpret_cast<const int8_t*>(row.data), *row.factor, d, values);
  } else {
    kernels.convert_row(row.data, dtype, values, DType::kF32, d);
  }
}

// Positions [first, first + n) of one head, then zero rows up to a multiple of kPadding.
void load_run(const Call& call, const PagedKv& kv, void* const* blocks, int64_t g, int64_t first, int64_t n,
              float* rows) {
  const int64_t d = call.padded_d();
  for (int64_t j = 0; j < n; ++j) {
    load_cache_row(cache_row(blocks, kv, first + j, g, call.G, call.d), kv.dtype, call.d, rows + j * d);
    std::fill(rows + j * d + call.d, rows + (j + 1) * d, 0.0f);
  }
  std::fill(rows + n * d, rows + round_up(n, kPadding) * d, 0.0f);
}

void load_queries(const Call& call, int64_t g, const TokenBlock& tokens, const Scratch& scratch) {
  const int64_t d = call.padded_d(), R = call.heads_per_group(), queries = tokens.count * R;
  for (int64_t i = 0; i < queries; ++i) {
    const float* q = call.q + (tokens.row() + i / R) * call.token_stride + (g * R + i % R) * call.d;
    std::copy(q, q + call.d, scratch.queries + i * d);
    std::fill(scratch.queries + i * d + call.d, scratch.queries + (i + 1) * d, 0.0f);
  }
  std::fill(scratch.outs, scratch.outs + queries * d, 0.0f);
  std::fill(scratch.maxima, scratch.maxima + queries, -std::numeric_limits<float>::infinity());
  std::fill(scratch.sums, scratch.sums + queries, 0.0f);
}

void store_outs(const Call& call, int64_t g, const TokenBlock& tokens, const Scratch& scratch) {
  const int64_t d = call.padded_d(), R = call.heads_per_group();
  for (int64_t i = 0; i < tokens.count * R; ++i) {
    float* out = call.out_THd + ((tokens.row() + i / R) * call.H + g * R + i % R) * call.d;
    active_kernels().scale_row(scratch.outs + i * d, DType::kF32, 1.0f / scratch.sums[i], out, DType::kF32, call.d);
  }
}

void attend_tokens(const Call& call, int64_t g, const TokenBlock& tokens, const Scratch& scratch) {
  const KernelTable& kernels = active_kernels();
  const PagedKv& kv = tokens.chunk->kv;
  const int64_t d = call.padded_d(), R = call.heads_per_group();
  const int64_t first_position = tokens.position(), end = first_position + tokens.count;
  load_queries(call, g, tokens, scratch);
  for (int64_t run = 0; run < end; run += kRunKeys) {
    const int64_t n = std::min(kRunKeys, end - run);
    load_run(call, kv, kv.k_blocks, g, run, n, scratch.keys);
    load_run(call, kv, kv.v_blocks, g, run, n, scratch.values);
    for (int64_t i = 0; i < tokens.count * R; ++i) {
      const int64_t visible = std::min(n, first_position + i / R + 1 - run);
      if (visible <= 0) continue;
      kernels.attend({scratch.queries + i * d, scratch.keys, scratch.values, visible, d, call.scale, scratch.scores,
                      scratch.maxima + i, scratch.sums + i, scratch.outs + i * d});
    }
  }
  store_outs(call, g, tokens, scratch);
}

}  // namespace

int64_t kv_block_bytes(DType dtype, int64_t block_size, int64_t G, int64_t d) {
  const int64_t factors = dtype == DType::kI8 ? G * block_size * static_cast<int64_t>(sizeof(float)) : 0;
  return values_bytes(dtype, block_size, G, d) + factors;
}

void append_kv(std::span<const AttentionChunk> chunks, const float* k, const float* v, int64_t token_stride, int64_t G,
               int64_t d, ThreadPool& pool) {
  for (const AttentionChunk& chunk : chunks) {
    parallel_rows(chunk.T, 2 * G * d, pool, [&](int64_t t) {
      const int64_t position = chunk.S - chunk.T + t, row = (chunk.first_row + t) * token_stride;
      for (int64_t g = 0; g < G; ++g) {
        store_cache_row(k + row + g * d, chunk.kv.dtype, d, cache_row(chunk.kv.k_blocks, chunk.kv, position, g, G, d));
        store_cache_row(v + row + g * d, chunk.kv.dtype, d, cache_row(chunk.kv.v_blocks, chunk.kv, position, g, G, d));
      }
    });
  }
}

void attention(std::span<const AttentionChunk> chunks, const float* q, int64_t token_stride, int64_t H, int64_t G,
               int64_t d, float scale, float* out_THd, ThreadPool& pool) {
  COTERIE_CHECK(G > 0 && H % G == 0, "heads do not fit");
  for (const AttentionChunk& chunk : chunks) COTERIE_CHECK(chunk.T <= chunk.S, "lengths do not fit");
  const Call call = {q, token_stride, H, G, d, scale, out_THd};
  const std::vector<TokenBlock> blocks = token_blocks(chunks);
  static thread_local Workspace workspace;
  const size_t floats = Scratch::floats(call);
  workspace.reserve(Workspace::padded(floats * 4 * static_cast<size_t>(pool.num_threads())));
  float* const memory = workspace.take<float>(floats * static_cast<size_t>(pool.num_threads()));
  pool.run(static_cast<int64_t>(blocks.size()) * G, [&](int64_t task, int thread) {
    const Scratch scratch(memory + static_cast<size_t>(thread) * floats, call);
    attend_tokens(call, task % G, blocks[static_cast<size_t>(task / G)], scratch);
  });
}

}  // namespace coterie
