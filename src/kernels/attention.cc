// Attention by (block of a sequence's new tokens, heads that share a KV head) tasks. A task, or a few that read what
// lies side by side, walks the keys in runs of kRunKeys at fixed absolute positions, and lets every query of its tokens
// and heads attend to as much of the run as lies in its past. A query thus sees the same runs in the same order however
// the prompt was cut. Few queries read a run where it lies in the cache; many bring it into scratch once, in panels.
// Both compute the same: in the type of the cache, where that has one that is made for products. Queries and weights
// are rounded to bf16 beside a cache in bf16, and to integers of 16 bits beside one of 8; sums are in fp32 or exact.
#include "kernels/attention.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/round.h"
#include "kernels/kernel_table.h"
#include "kernels/panel_product.h"
#include "kernels/parallel_rows.h"
#include "kernels/workspace.h"

namespace coterie {
namespace {

// Keys and values of a run fill half of an L1 cache at head_dim 64, and stay in L2 at any size.
constexpr int64_t kRunKeys = AttendStep::kRunKeys;
// Queries of a task, at most: amortizes bringing a run in. Where many heads share their keys, as in latent attention,
// several tasks bring in the same run, so that all threads have work.
constexpr int64_t kMostTokensPerTask = 64;
constexpr int64_t kHeadsPerTask = 16;
constexpr int64_t kQueriesPerTask = 256;
constexpr int64_t kPadding = AttendStep::kPadding;
constexpr int64_t kGroupRows = AttendStep::kGroupRows;
constexpr int64_t kRunGroups = kRunKeys / kGroupRows;
// Up to here converting every key for each query costs less than writing it to memory and reading it.
constexpr int64_t kMostInPlace = 16;
// To write an element to the cache, in its type, takes as long as so many steps of element-wise work.
constexpr int64_t kStoringCost = 2;

// Of what lies in scratch: numbers in fp32, or halves that are bf16 or integers.
DType scratch_dtype(DType cache) { return cache == DType::kF32 ? DType::kF32 : DType::kBF16; }
int64_t scratch_size(DType cache) { return static_cast<int64_t>(dtype_size(scratch_dtype(cache))); }

struct Call {
  const float* q_THd;
  const AttentionShape& shape;
  float* out_THv;

  int64_t padded_d() const { return round_up(shape.d, kPadding); }
  int64_t padded_v() const { return round_up(shape.v, kPadding); }
  int64_t heads_per_group() const { return shape.H / shape.G; }
  int64_t heads_per_task() const { return std::min(heads_per_group(), kHeadsPerTask); }
  int64_t tokens_per_task() const { return std::min(kMostTokensPerTask, kQueriesPerTask / heads_per_task()); }
  int64_t queries_per_task() const { return tokens_per_task() * heads_per_task(); }
  int64_t parts_per_group() const { return (heads_per_group() + kHeadsPerTask - 1) / kHeadsPerTask; }
  int64_t tasks_per_block() const { return shape.G * parts_per_group(); }
};

// Tokens [first, first + count) of a chunk.
struct TokenBlock {
  const AttentionChunk* chunk;
  int64_t first, count;

  int64_t row() const { return chunk->first_row + first; }
  int64_t position() const { return chunk->S - chunk->T + first; }
};

// A block with `heads` heads from first_head on, all of one group. Query i is head(i) of the token in row(i).
struct Task {
  TokenBlock tokens;
  int64_t g, first_head, heads;

  int64_t queries() const { return tokens.count * heads; }
  int64_t row(int64_t i) const { return tokens.row() + i / heads; }
  int64_t head(int64_t i) const { return first_head + i % heads; }
};

Task task_of(const Call& call, std::span<const TokenBlock> blocks, int64_t index) {
  const int64_t parts = call.parts_per_group(), g = index / parts % call.shape.G;
  const int64_t head_in_group = index % parts * kHeadsPerTask;
  return {.tokens = blocks[static_cast<size_t>(index / (parts * call.shape.G))],
          .g = g,
          .first_head = g * call.heads_per_group() + head_in_group,
          .heads = std::min(kHeadsPerTask, call.heads_per_group() - head_in_group)};
}

// Tasks [first, first + count) of one block, which walk the keys together.
struct Walk {
  int64_t first, count;
};

// Of a few tokens, a task reads little of each block of the cache, and what the next one reads lies behind it: together
// they read long pieces. But there should be several walks for every thread, unless one for each is as long as the
// others.
std::vector<Walk> walks_of(const Call& call, std::span<const TokenBlock> blocks, int num_threads) {
  const int64_t tasks = call.tasks_per_block(), num_blocks = static_cast<int64_t>(blocks.size());
  const int64_t wanted = (num_blocks == 1 && tasks % num_threads == 0 ? 1 : 4) * num_threads;
  const int64_t affordable = std::max<int64_t>(1, num_blocks * tasks / wanted);
  std::vector<Walk> walks;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t queries = blocks[static_cast<size_t>(block)].count * call.heads_per_task();
    const int64_t together =
        queries > kMostInPlace ? 1 : std::min({tasks, affordable, call.queries_per_task() / queries});
    for (int64_t first = 0; first < tasks; first += together) {
      walks.push_back({block * tasks + first, std::min(together, tasks - first)});
    }
  }
  return walks;
}

// The last tokens see the most keys: they go first, so that no long task is left for the end.
std::vector<TokenBlock> token_blocks(std::span<const AttentionChunk> chunks, int64_t most_tokens) {
  std::vector<TokenBlock> blocks;
  for (const AttentionChunk& chunk : chunks) {
    for (int64_t end = chunk.T; end > 0;) {
      const int64_t first = (end - 1) / most_tokens * most_tokens;
      blocks.push_back({&chunk, first, end - first});
      end = first;
    }
  }
  return blocks;
}

// Makes panels of what scratch holds.
PanelProduct product_of(DType cache) { return {active_kernels(), scratch_dtype(cache)}; }

// A thread's memory, large enough for fp32. Columns from d (or v) on are zero: they take part in the arithmetic, with
// no effect.
struct Scratch {
  uint32_t *key_panels = nullptr, *value_panels = nullptr;
  char *rows = nullptr, *queries = nullptr;  // in scratch_dtype
  float *key_factors = nullptr, *value_factors = nullptr, *query_factors = nullptr;
  float *outs = nullptr, *scores = nullptr, *maxima = nullptr, *sums = nullptr;

  // Memory from `memory` on, or how much it takes.
  size_t lay_out(float* memory, const Call& call) {
    const int64_t count = call.queries_per_task(), d = call.padded_d(), v = call.padded_v();
    const PanelProduct product = product_of(DType::kF32);
    float* next = memory;
    const auto take = [&](int64_t floats) { return std::exchange(next, next + round_up(floats, 16)); };
    key_panels = reinterpret_cast<uint32_t*>(take(product.size_of_b(kRunKeys, d)));
    value_panels = reinterpret_cast<uint32_t*>(take(product.size_of_b(v, kRunKeys)));
    rows = reinterpret_cast<char*>(take(kRunKeys * std::max(d, v)));
    queries = reinterpret_cast<char*>(take(count * d));
    key_factors = take(kRunKeys);
    value_factors = take(kRunKeys);
    query_factors = take(count);
    outs = take(count * v);
    scores = take(AttendStep::kMostTileQueries * kRunKeys);
    maxima = take(count);
    sums = take(count);
    return static_cast<size_t>(next - memory);
  }
  // For the queries behind the first `count`.
  Scratch behind(const Call& call, DType cache, int64_t count) const {
    Scratch rest = *this;
    rest.queries += count * call.padded_d() * scratch_size(cache);
    rest.query_factors += count;
    rest.outs += count * call.padded_v();
    rest.maxima += count;
    rest.sums += count;
    return rest;
  }
};

// A row of keys or of values, and its factor where the type has one.
struct CacheRow {
  char* data;
  float* factor;
};

// The keys and values of head g.
class HeadCache {
 public:
  HeadCache(const PagedKv& kv, const AttentionShape& shape, int64_t g)
      : blocks_(kv.blocks), block_size_(static_cast<uint64_t>(kv.block_size)) {
    const KvBlock block(kv.dtype, kv.block_size, shape.G, shape.d, kv.has_values ? shape.v : 0);
    const auto element = static_cast<int64_t>(dtype_size(kv.dtype));
    keys_ = {block.keys(g), block.key_factors(g), shape.d * element};
    values_ = kv.has_values ? Rows{block.values(g), block.value_factors(g), shape.v * element} : keys_;
  }

  CacheRow key(int64_t position) const { return row(keys_, position); }
  CacheRow value(int64_t position) const { return row(values_, position); }  // its key where that holds it

 private:
  // Where they begin in a block, in bytes.
  struct Rows {
    int64_t first, factors, row_bytes;
  };

  CacheRow row(const Rows& rows, int64_t position) const {
    const auto offset = static_cast<int64_t>(static_cast<uint64_t>(position) % block_size_);
    auto* const block = static_cast<char*>(blocks_[static_cast<uint64_t>(position) / block_size_]);
    return {block + rows.first + offset * rows.row_bytes, reinterpret_cast<float*>(block + rows.factors) + offset};
  }

  void* const* blocks_;
  uint64_t block_size_;
  Rows keys_, values_;
};

void store_cache_row(const float* values, DType dtype, int64_t d, const CacheRow& row) {
  const KernelTable& kernels = active_kernels();
  if (dtype == DType::kI8) {
    *row.factor = kernels.quantize_row(values, d, reinterpret_cast<int8_t*>(row.data));
  } else {
    kernels.convert_row(values, DType::kF32, row.data, dtype, d);
  }
}

// A row of scratch: d elements, and zeros up to `padded`.
void fill_up(char* row, DType dtype, int64_t d, int64_t padded) {
  const int64_t size = scratch_size(dtype);
  std::fill(row + d * size, row + padded * size, char{0});
}

// n rows as rows of scratch, of `dim` elements; row(j) is one of the cache. The factors of integers are copied.
template <typename Row>
void load_run(const Row& row, DType dtype, int64_t n, int64_t dim, char* rows, float* factors) {
  const KernelTable& kernels = active_kernels();
  const int64_t padded = round_up(dim, kPadding), row_bytes = padded * scratch_size(dtype);
  for (int64_t j = 0; j < n; ++j, rows += row_bytes) {
    const CacheRow from = row(j);
    if (dtype == DType::kI8) {
      factors[j] = *from.factor;
      kernels.widen_row(reinterpret_cast<const int8_t*>(from.data), dim, reinterpret_cast<int16_t*>(rows));
    } else {
      std::copy(from.data, from.data + dim * scratch_size(dtype), rows);
    }
    fill_up(rows, dtype, dim, padded);
  }
}

// The largest code of a query for which no sum of products with codes of 8 bits overflows.
int32_t largest_code(int64_t d) {
  return static_cast<int32_t>(std::min<int64_t>(32767, std::numeric_limits<int32_t>::max() / (127 * d)));
}

void load_queries(const Call& call, const Task& task, const Scratch& scratch) {
  const AttentionShape& shape = call.shape;
  const KernelTable& kernels = active_kernels();
  const DType cache = task.tokens.chunk->kv.dtype;
  const int64_t d = call.padded_d(), count = task.queries();
  for (int64_t i = 0; i < count; ++i) {
    const float* const q = call.q_THd + (task.row(i) * shape.H + task.head(i)) * shape.d;
    char* const row = scratch.queries + i * d * scratch_size(cache);
    if (cache == DType::kI8) {
      auto* const codes = reinterpret_cast<int16_t*>(row);
      scratch.query_factors[i] = kernels.quantize_row_wide(q, shape.d, largest_code(d), codes);
    } else {
      kernels.convert_row(q, DType::kF32, row, cache, shape.d);
    }
    fill_up(row, cache, shape.d, d);
    scratch.maxima[i] = shape.sinks_H ? shape.sinks_H[task.head(i)] : -std::numeric_limits<float>::infinity();
    scratch.sums[i] = shape.sinks_H ? 1.0f : 0.0f;  // exp(sink - maximum)
  }
  std::fill(scratch.outs, scratch.outs + count * call.padded_v(), 0.0f);
}

void store_outs(const Call& call, const Task& task, const Scratch& scratch) {
  const AttentionShape& shape = call.shape;
  for (int64_t i = 0; i < task.queries(); ++i) {
    float* out = call.out_THv + (task.row(i) * shape.H + task.head(i)) * shape.v;
    active_kernels().scale_row(scratch.outs + i * call.padded_v(), DType::kF32, 1.0f / scratch.sums[i], out,
                               DType::kF32, shape.v);
  }
}

// The first position that a token sees.
int64_t first_visible(const AttentionShape& shape, int64_t position) {
  return shape.window > 0 ? std::max<int64_t>(0, position - shape.window + 1) : 0;
}

// Where the keys and values of a run are: in panels, or by groups, null where there is none.
struct Run {
  PanelsOfB key_panels, value_panels;
  const void *keys[kRunGroups] = {}, *values[kRunGroups] = {};
  const float *key_factors[kRunGroups] = {}, *value_factors[kRunGroups] = {};
};

bool can_read_in_place(const Call& call, const Task& task) {
  return task.queries() <= kMostInPlace && task.tokens.chunk->kv.block_size % kGroupRows == 0 &&
         call.padded_d() == call.shape.d && call.padded_v() == call.shape.v;
}

void set_groups(const HeadCache& cache, int64_t first, int64_t n, Run& run) {
  for (int64_t i = 0; i < kRunGroups; ++i) {
    const int64_t position = first + i * kGroupRows;
    const bool there = i * kGroupRows < n;
    const CacheRow none = {}, key = there ? cache.key(position) : none, value = there ? cache.value(position) : none;
    run.keys[i] = key.data, run.key_factors[i] = key.factor;
    run.values[i] = value.data, run.value_factors[i] = value.factor;
  }
}

void bring_into_scratch(const Call& call, const PagedKv& kv, const HeadCache& cache, int64_t first, int64_t n,
                        const Scratch& scratch, Run& run) {
  const AttentionShape& shape = call.shape;
  const PanelProduct product = product_of(kv.dtype);
  const auto rows = [&](int64_t cols) {
    return row_major(static_cast<const void*>(scratch.rows), product.type, n, cols);
  };
  load_run([&](int64_t j) { return cache.key(first + j); }, kv.dtype, n, shape.d, scratch.rows, scratch.key_factors);
  ConstMatrix values = rows(call.padded_d());
  run.key_panels = product.pack_b(values, scratch.key_panels);
  if (kv.has_values) {
    load_run([&](int64_t j) { return cache.value(first + j); }, kv.dtype, n, shape.v, scratch.rows,
             scratch.value_factors);
    values = rows(call.padded_v());
  }
  values.cols = call.padded_v();  // of a key its first elements
  run.value_panels = product.pack_b(values.transposed(), scratch.value_panels);
  for (int64_t i = 0; i < kRunGroups; ++i) {
    run.key_factors[i] = scratch.key_factors + i * kGroupRows;
    run.value_factors[i] = (kv.has_values ? scratch.value_factors : scratch.key_factors) + i * kGroupRows;
  }
}

// Every query of the task against the n keys of a run.
void attend_run(const Call& call, const Task& task, const Run& run, int64_t first, int64_t n, const Scratch& scratch,
                const AttendStep::Coming& while_scoring, const AttendStep::Coming& while_adding) {
  const DType cache = task.tokens.chunk->kv.dtype;
  const bool has_factors = cache == DType::kI8;
  active_kernels().attend({.q = reinterpret_cast<const uint32_t*>(scratch.queries),
                           .q_factors = has_factors ? scratch.query_factors : nullptr,
                           .queries = task.queries(),
                           .heads = task.heads,
                           .position = task.tokens.position() - first,
                           .window = call.shape.window,
                           .dtype = cache,
                           .key_panels = run.key_panels.data,
                           .value_panels = run.value_panels.data,
                           .key_panel_units = run.key_panels.panel_units,
                           .value_panel_units = run.value_panels.panel_units,
                           .keys = run.keys,
                           .values = run.values,
                           .key_factors = has_factors ? run.key_factors : nullptr,
                           .value_factors = has_factors ? run.value_factors : nullptr,
                           .while_scoring = while_scoring,
                           .while_adding = while_adding,
                           .n = n,
                           .d = call.padded_d(),
                           .v = call.padded_v(),
                           .value_stride = task.tokens.chunk->kv.has_values ? call.shape.v : call.shape.d,
                           .scale = call.shape.scale,
                           .scores = scratch.scores,
                           .maxima = scratch.maxima,
                           .sums = scratch.sums,
                           .outs = scratch.outs});
}

// One task of a walk, with its memory.
struct Part {
  Task task;
  HeadCache cache;
  Scratch scratch;
};

// The tasks take turns at each run.
class Turns {
 public:
  Turns(const Call& call, std::span<const Part> parts) : call_(call), parts_(parts) {
    const TokenBlock& tokens = parts.front().task.tokens;
    end_ = tokens.position() + tokens.count;
    first_ = first_visible(call.shape, tokens.position()) / kRunKeys * kRunKeys;
    in_place_ = can_read_in_place(call, parts.front().task);
  }

  void take() {
    for (Turn& turn : turns_) set(turn);
    for (size_t now = 0; turns_[now].keys > 0; now = (now + 1) % turns_.size()) {
      Turn& turn = turns_[now];
      const Part& part = parts_[turn.part];
      if (!in_place_) bring_into_scratch(call_, kv(), part.cache, turn.first, turn.keys, part.scratch, turn.run);
      attend_run(call_, part.task, turn.run, turn.first, turn.keys, part.scratch, coming(now, halves_ahead()),
                 coming(now, halves_ahead() + 1));
      set(turn);
    }
  }

 private:
  struct Turn {
    size_t part = 0;
    int64_t first = 0, keys = 0;
    Run run;
  };

  // Makes it the next one that is not among turns_ yet; without keys where there is none.
  void set(Turn& turn) {
    turn.keys = std::min(kRunKeys, end_ - first_);
    if (turn.keys <= 0) return;
    turn.first = first_, turn.part = part_;
    if (in_place_) set_groups(parts_[part_].cache, first_, turn.keys, turn.run);
    if (++part_ == parts_.size()) part_ = 0, first_ += kRunKeys;
  }

  const PagedKv& kv() const { return parts_.front().task.tokens.chunk->kv; }
  int64_t row_bytes(bool values) const {
    return (values ? call_.shape.v : call_.shape.d) * static_cast<int64_t>(dtype_size(kv().dtype));
  }

  // A turn reads keys in its first half and values in its second. Memory takes as long to bring them as about so many
  // bytes to be read.
  size_t halves_ahead() const {
    constexpr int64_t kBytesAhead = 8 << 10;
    return !kv().has_values || kRunKeys * row_bytes(false) < kBytesAhead ? 2 : 1;
  }
  // What is read so many halves after turn `now` began.
  AttendStep::Coming coming(size_t now, size_t halves) const {
    const Turn& turn = turns_[(now + halves / 2) % turns_.size()];
    const bool values = halves % 2 == 1, has_factors = kv().dtype == DType::kI8;
    if (!in_place_ || turn.keys <= 0 || (values && !kv().has_values)) return {};
    const auto* const factors = values ? turn.run.value_factors : turn.run.key_factors;
    return {values ? turn.run.values : turn.run.keys, has_factors ? factors : nullptr, row_bytes(values)};
  }

  const Call& call_;
  std::span<const Part> parts_;
  int64_t first_ = 0, end_ = 0;
  size_t part_ = 0;
  bool in_place_ = false;
  std::array<Turn, 2> turns_;  // this one, and the one to come, in turn
};

void attend_walk(const Call& call, std::span<const TokenBlock> blocks, const Walk& walk, Scratch scratch) {
  static thread_local std::vector<Part> parts;
  parts.clear();
  for (int64_t i = 0; i < walk.count; ++i) {
    const Task task = task_of(call, blocks, walk.first + i);
    load_queries(call, task, scratch);
    parts.push_back({task, HeadCache(task.tokens.chunk->kv, call.shape, task.g), scratch});
    scratch = scratch.behind(call, task.tokens.chunk->kv.dtype, task.queries());
  }
  Turns(call, parts).take();
  for (const Part& part : parts) store_outs(call, part.task, part.scratch);
}

void append_token(const PagedKv& kv, const AttentionShape& shape, int64_t position, const float* k_Gd,
                  const float* values_Gv) {
  for (int64_t g = 0; g < shape.G; ++g) {
    const HeadCache cache(kv, shape, g);
    store_cache_row(k_Gd + g * shape.d, kv.dtype, shape.d, cache.key(position));
    if (kv.has_values) store_cache_row(values_Gv + g * shape.v, kv.dtype, shape.v, cache.value(position));
  }
}

}  // namespace

KvBlock::KvBlock(DType dtype, int64_t block_size, int64_t G, int64_t d, int64_t v) {
  const auto element = static_cast<int64_t>(dtype_size(dtype)), factor = static_cast<int64_t>(sizeof(float));
  key_bytes_ = block_size * d * element;
  head_bytes_ = key_bytes_ + block_size * v * element;
  factor_bytes_ = dtype == DType::kI8 ? block_size * factor : 0;
  head_factor_bytes_ = v > 0 ? 2 * factor_bytes_ : factor_bytes_;
  first_factor_ = round_up(G * head_bytes_, factor);
  bytes_ = first_factor_ + G * head_factor_bytes_;
}

void append_kv(std::span<const AttentionChunk> chunks, const float* k_TGd, const float* values_TGv,
               const AttentionShape& shape, ThreadPool& pool) {
  const int64_t G = shape.G, d = shape.d, v = shape.v;
  // Tokens of all chunks, one behind the other: a step may have one of each of many.
  std::vector<int64_t> ends;
  for (const AttentionChunk& chunk : chunks) ends.push_back((ends.empty() ? 0 : ends.back()) + chunk.T);
  if (ends.empty()) return;
  parallel_rows(ends.back(), kStoringCost * G * (d + v), pool, [&](int64_t token) {
    const auto index = std::upper_bound(ends.begin(), ends.end(), token) - ends.begin();
    const AttentionChunk& chunk = chunks[static_cast<size_t>(index)];
    const int64_t t = token - (ends[static_cast<size_t>(index)] - chunk.T);
    const int64_t position = chunk.S - chunk.T + t, row = chunk.first_row + t;
    const float* const values = chunk.kv.has_values ? values_TGv + row * G * v : nullptr;
    append_token(chunk.kv, shape, position, k_TGd + row * G * d, values);
  });
}

void attention(std::span<const AttentionChunk> chunks, const float* q_THd, const AttentionShape& shape, float* out_THv,
               ThreadPool& pool) {
  COTERIE_CHECK(shape.G > 0 && shape.H % shape.G == 0, "heads do not fit");
  for (const AttentionChunk& chunk : chunks) {
    COTERIE_CHECK(chunk.T <= chunk.S, "lengths do not fit");
    COTERIE_CHECK(chunk.kv.has_values || shape.v <= shape.d, "values are wider than the keys that hold them");
  }
  const Call call = {q_THd, shape, out_THv};
  const std::vector<TokenBlock> blocks = token_blocks(chunks, call.tokens_per_task());
  static thread_local Workspace workspace;
  Scratch scratch;
  const size_t floats = scratch.lay_out(nullptr, call);
  workspace.reserve(Workspace::padded(floats * 4 * static_cast<size_t>(pool.num_threads())));
  float* const memory = workspace.take<float>(floats * static_cast<size_t>(pool.num_threads()));
  const std::vector<Walk> walks = walks_of(call, blocks, pool.num_threads());
  pool.run(static_cast<int64_t>(walks.size()), [&](int64_t index, int thread) {
    Scratch own;
    own.lay_out(memory + static_cast<size_t>(thread) * floats, call);
    attend_walk(call, blocks, walks[static_cast<size_t>(index)], own);
  });
}

}  // namespace coterie
