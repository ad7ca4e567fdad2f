// The tasks of a group of products, as gemm_plan.h cuts it.
#include "kernels/gemm.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "base/check.h"
#include "kernels/gemm_plan.h"
#include "kernels/parallel_rows.h"
#include "kernels/workspace.h"

namespace coterie {
namespace {

// Panels [first, last) of one operand of one problem, or strips of A.
struct PackTask {
  const Plan* plan;
  bool is_b;
  int64_t first, last;

  void run() const {
    if (is_b) {
      plan->b.pack(first, last, const_cast<uint32_t*>(plan->b_panels) + first * plan->b.panel_units());
    } else if (plan->in_strips()) {
      plan->b.kernels->pack_strips(plan->a, plan->b.type, plan->rows.M, first, last,
                                   plan->a_panels + first * plan->strip_units());
    } else {
      plan->b.kernels->pack_a(plan->a, plan->b.type, plan->rows, first, last, plan->a_panels + plan->a_units(0, first));
    }
  }
};

// Sums of rows [row, row + rows) of C and of panel pb of B become a part of C.
void store_tile(const Plan& plan, int64_t row, int64_t rows, int64_t pb, const float* tile) {
  const GemmProblem& p = *plan.problem;
  const int64_t column = pb * plan.b.width();
  TileStore store;
  store.tile = tile;
  store.rows = rows;
  store.cols = std::min(plan.b.width(), p.c.cols - column);
  const Matrix c = p.c.row_range(row, rows);
  store.c = static_cast<char*>(c.data) + column * static_cast<int64_t>(dtype_size(c.dtype));
  store.c_dtype = c.dtype;
  store.c_stride = c.row_stride;
  if (p.slopes.data) {
    const Matrix slopes = p.slopes.row_range(row, rows);
    store.slopes = static_cast<char*>(slopes.data) + column * static_cast<int64_t>(dtype_size(slopes.dtype));
    store.slopes_stride = slopes.row_stride;
    store.slopes_up_offset = p.c.cols;
  }
  if (p.bias_N) {
    store.bias = p.bias_N + column;
    store.bias_up = p.bias_N + p.c.cols + column;
  }
  store.activation = p.activation;
  store.gated = p.gated;
  store.accumulate = p.accumulate;
  store.stream = plan.stream;
  plan.b.kernels->store_tile(store);
}

// One of several panels of A that meet a group of panels of B one after the other.
struct Turn {
  int64_t index = 0, of = 1;
  bool more = false;  // groups, for the same task
};

// A part of K, in units.
struct Slice {
  int64_t first = 0, units = 0;

  // Its part of an operand.
  PackSource of(const Plan& plan, const PackSource& source) const {
    if (!plan.in_slices()) return source;
    return columns_of(source, first * elements_of_unit(plan.b.type), plan.slice_cols());
  }
};

// One panel of A with panels [first_b, last_b) of B, from where the slice begins in them.
struct Tiles {
  int64_t pa = 0, first_b = 0, last_b = 0;
  const uint32_t *a_panel = nullptr, *b_panels = nullptr;
  int64_t panel_units_b = 0;  // from a panel of B to the next
  Slice slice = {};
  float* waiting = nullptr;  // sums of the slices so far, tile by tile, unless the slice is all of K
  Turn turn = {};

  int64_t num_b() const { return last_b - first_b; }
};

// Quantized panels, all of K at once, which they have their ways for. In the first turn they come from memory, and the
// last one asks for the next group's.
void compute_quantized_tiles(const Plan& plan, const Tiles& t) {
  alignas(64) float tile[kMaxPanelRows * kMaxPanelColumns];
  const KernelTable& kernels = *plan.b.kernels;
  const int rows = plan.rows.rows(t.pa);
  const auto multiply = kernels.multiply_quantized[index_of(plan.b.type) - kFirstQuantized][rows - 1];
  const QuantizedFormat format = quantized_format(plan.b.type);
  int64_t ahead = t.turn.index == 0 ? bytes_ahead(format.bits, rows * format.parts) : 0;
  if (t.turn.more && t.turn.index > 0 && t.turn.index + 1 == t.turn.of) ahead = t.num_b() * t.panel_units_b * 4;
  const uint32_t* b_panel = t.b_panels;
  for (int64_t pb = t.first_b; pb < t.last_b; ++pb, b_panel += t.panel_units_b) {
    multiply(plan.a.cols, t.a_panel, b_panel, ahead, tile);
    store_tile(plan, plan.rows.first_row(t.pa), rows, pb, tile);
  }
}

// What is asked for during the products with the part of a panel of B that lies at b, from unit `done` of the slice on,
// in rows of so many units of memory. In the first turn it comes from memory; in the others it lies in a cache, and
// each asks for a share of the next group's panel.
Ahead ahead_of(const Plan& plan, const Tiles& t, int64_t done, int64_t row, const uint32_t* b) {
  if (t.turn.index == 0) return ahead_in_panel(b, row, units_ahead(plan.rows.rows(t.pa), plan.b.compact));
  const int64_t step = ceil_div(row, t.turn.of - 1);
  const uint32_t* const next = b - done * row + t.num_b() * t.panel_units_b;
  return {next + ((t.turn.index - 1) * t.slice.units + done) * step, step};
}

// Compact panels, all of K at once.
void compute_compact_tiles(const Plan& plan, const Tiles& t) {
  alignas(64) float tile[kMaxPanelRows * kMaxPanelColumns];
  const CompactPanel shape = plan.b.compact_panel();
  const int rows = plan.rows.rows(t.pa);
  const auto multiply = plan.b.kernels->multiply_compact[rows - 1];
  const uint32_t* b_panel = t.b_panels;
  for (int64_t pb = t.first_b; pb < t.last_b; ++pb, b_panel += t.panel_units_b) {
    const Ahead ahead = ahead_of(plan, t, 0, shape.codes_of_unit(), b_panel + shape.codes());
    multiply(shape, t.a_panel, b_panel, ahead, tile);
    store_tile(plan, plan.rows.first_row(t.pa), rows, pb, tile);
  }
}

// Straight into C, all of whose columns are there, with all of K at once.
void compute_rows(const Plan& plan, const Tiles& t) {
  const KernelTable& kernels = *plan.b.kernels;
  const int rows = plan.rows.rows(t.pa);
  const auto multiply = kernels.multiply_into_rows[index_of(plan.b.type)][rows - 1];
  const Matrix c = plan.problem->c.row_range(plan.rows.first_row(t.pa), rows);
  const auto size = static_cast<int64_t>(dtype_size(c.dtype));
  const float* const bias_N = plan.problem->bias_N;
  const uint32_t* b_panel = t.b_panels;
  for (int64_t pb = t.first_b; pb < t.last_b; ++pb, b_panel += t.panel_units_b) {
    const int64_t column = pb * plan.b.width();
    const Ahead ahead = ahead_of(plan, t, 0, kernels.panel_columns(), b_panel);
    multiply(plan.units, t.a_panel, b_panel, ahead,
             {static_cast<char*>(c.data) + column * size, c.row_stride * size, c.dtype,
              bias_N ? bias_N + column : nullptr, plan.stream});
  }
}

// Where the ISA wants shorter slices, one of them at a time, so that the panel of A stays in the L1 cache. Sums wait in
// fp32, which changes no bit of them.
void compute_tiles(const Plan& plan, const Tiles& t) {
  if (is_quantized(plan.b.type)) return compute_quantized_tiles(plan, t);
  if (plan.b.compact) return compute_compact_tiles(plan, t);
  const bool all_columns = t.last_b * plan.b.width() <= plan.problem->c.cols;
  if (plan.into_rows && all_columns) return compute_rows(plan, t);
  alignas(64) float own_tiles[kMostGroupB * kMaxPanelRows * kMaxPanelColumns];
  float* const tiles = t.waiting ? t.waiting : own_tiles;
  const KernelTable& kernels = *plan.b.kernels;
  const bool bf16 = plan.b.type == PanelType::kBF16;
  const int rows = plan.rows.rows(t.pa);
  const bool wait = t.waiting || t.slice.units > kernels.slice_units[bf16];
  const int64_t tile_size = wait ? plan.tile_size() : 0;
  int64_t done = 0;
  do {
    const int64_t units = std::min(t.slice.units - done, kernels.slice_units[bf16]), first = t.slice.first + done;
    const uint32_t* const a = t.a_panel + kernels.a_units(plan.b.type, done) * rows;
    const uint32_t* b = t.b_panels + done * kernels.panel_columns();
    for (int64_t pb = t.first_b; pb < t.last_b; ++pb, b += t.panel_units_b) {
      float* const tile = tiles + (pb - t.first_b) * tile_size;
      const Ahead ahead = ahead_of(plan, t, done, kernels.panel_columns(), b);
      kernels.multiply[bf16][rows - 1](units, a, b, ahead, tile, first > 0);
      if (first + units == plan.units) store_tile(plan, plan.rows.first_row(t.pa), rows, pb, tile);
    }
    done += units;
  } while (done < t.slice.units);
}

// Panel pb of B where it lies. The one after it is asked for unless the task ends here.
PanelInPlace panel_in_place(const Plan& plan, int64_t pb, bool last) {
  const int64_t width = plan.b.kernels->width, N = plan.problem->c.cols, column = pb * plan.b.width();
  const ConstMatrix& b = plan.problem->b;
  const auto size = static_cast<int64_t>(dtype_size(b.dtype));
  PanelInPlace panel;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t row = column + half * (plan.b.gated ? N : width), left = N - (plan.b.gated ? column : row);
    panel.count[half] = static_cast<int>(std::clamp<int64_t>(left, 0, width));
    panel.start[half] = static_cast<const char*>(b.data) + row * b.row_stride * size;
  }
  panel.stride_bytes = (plan.in_place == InPlace::kAlongN ? b.col_stride : b.row_stride) * size;
  panel.cols = b.cols;
  panel.columns_ahead = last ? 0 : plan.b.width();
  return panel;
}

void multiply_few(const Plan& plan, int64_t first_b, int64_t last_b) {
  alignas(64) float tile[kMaxPanelRows * kMaxPanelColumns];
  const int rows = plan.rows.rows(0);
  const auto multiply = plan.b.kernels->multiply_few[plan.b.type == PanelType::kBF16][rows - 1];
  for (int64_t pb = first_b; pb < last_b; ++pb) {
    multiply(panel_in_place(plan, pb, pb + 1 == plan.Q), plan.units, plan.a_panels, tile);
    store_tile(plan, 0, rows, pb, tile);
  }
}

void multiply_along_k(const Plan& plan, int64_t first_b, int64_t last_b) {
  alignas(64) float tile[kMaxPanelRows * kMaxPanelColumns];
  const KernelTable& kernels = *plan.b.kernels;
  for (int64_t pb = first_b; pb < last_b; ++pb) {
    PanelInPlace b = panel_in_place(plan, pb, pb + 1 == last_b);
    for (int64_t strip = 0; strip < plan.strips(); strip += 2) {
      const int64_t row = strip * kernels.width, rows = std::min(plan.rows.M - row, int64_t{kernels.panel_columns()});
      const uint32_t* const strips = plan.a_panels + strip * plan.strip_units();
      kernels.multiply_along_k[plan.b.type == PanelType::kBF16](b, plan.units, strips, rows, tile);
      store_tile(plan, row, rows, pb, tile);
      b.columns_ahead = 0;  // asked for
    }
  }
}

// The tiles of C of the first panel of A and of panels [first_b, last_b) of B, at most kMostGroupB. They take turns at
// short parts of K, so that a row of B is read in long pieces. `packed`: null, or where the panels of B are left.
void multiply_group_along_n(const Plan& plan, int64_t first_b, int64_t last_b, uint32_t* packed) {
  constexpr int64_t kTile = kMaxPanelRows * kMaxPanelColumns;
  alignas(64) float tiles[kMostGroupB * kTile];
  const bool bf16 = plan.b.type == PanelType::kBF16;
  const int rows = plan.rows.rows(0);
  const auto multiply = plan.b.kernels->multiply_along_n[bf16][rows - 1];
  std::fill_n(tiles, (last_b - first_b) * kTile, 0.0f);
  for (int64_t u = 0; u < plan.units; u += kPartUnits) {
    const int64_t units = std::min(kPartUnits, plan.units - u), k = bf16 ? 2 * u : u;
    for (int64_t pb = first_b; pb < last_b; ++pb) {
      PanelInPlace b = panel_in_place(plan, pb, true);
      for (const void*& start : b.start) start = static_cast<const char*>(start) + k * b.stride_bytes;
      b.cols = std::min(bf16 ? 2 * units : units, b.cols - k);
      const int64_t part = (pb - first_b) * plan.b.panel_units() + u * plan.b.kernels->panel_columns();
      const uint32_t* const a = plan.a_panels + plan.b.kernels->a_units(plan.b.type, u) * rows;
      multiply(b, units, a, packed ? packed + part : nullptr, tiles + (pb - first_b) * kTile);
    }
  }
  for (int64_t pb = first_b; pb < last_b; ++pb) store_tile(plan, 0, rows, pb, tiles + (pb - first_b) * kTile);
}

// The first panel of A leaves panels of B in own_b for the others.
void multiply_along_n(const Plan& plan, int64_t first_b, int64_t last_b, uint32_t* own_b) {
  const int64_t whole = plan.problem->c.cols / plan.b.width(), panel_units = plan.b.panel_units();
  for (int64_t group_b = first_b; group_b < last_b; group_b += kMostGroupB) {
    const int64_t end_b = std::min(group_b + kMostGroupB, last_b), end_whole = std::min(end_b, whole);
    multiply_group_along_n(plan, group_b, end_whole, plan.P() > 1 ? own_b : nullptr);
    if (end_whole < end_b) plan.b.pack(whole, end_b, own_b + (whole - group_b) * panel_units);
    for (int64_t pa = 0; pa < plan.P(); ++pa) {
      const int64_t first = pa == 0 ? end_whole : group_b;
      compute_tiles(plan, {.pa = pa,
                           .first_b = first,
                           .last_b = end_b,
                           .a_panel = plan.a_panels + plan.a_units(0, pa),
                           .b_panels = own_b + (first - group_b) * panel_units,
                           .panel_units_b = panel_units,
                           .slice = {0, plan.units}});
    }
  }
}

// A task's part of C, in panels.
struct Block {
  int64_t first_a, last_a, first_b, last_b;
};

// A thread's memory for panels, and for the sums of a block where K is multiplied in slices.
struct OwnMemory {
  uint32_t *a, *b;
  float* sums;
};

// The panels of A of a block: rows of so many units, of which some lie before the slice.
struct PanelsA {
  const uint32_t* start;
  int64_t row_units, skipped;
};

PanelsA panels_a(const Plan& plan, const Block& block, Slice slice, uint32_t* own) {
  const KernelTable& kernels = *plan.b.kernels;
  if (!plan.own_a) {
    const uint32_t* const start = plan.a_panels + plan.a_units(0, block.first_a);
    return {start, plan.row_units(), kernels.a_units(plan.b.type, slice.first)};
  }
  const PackSource part = slice.of(plan, plan.a);
  kernels.pack_a(part, plan.b.type, plan.rows, block.first_a, block.last_a, own);
  return {own, kernels.a_row_units(plan.b.type, part.cols), 0};
}

void multiply_slice(const Plan& plan, const Block& block, Slice slice, const OwnMemory& own) {
  const int64_t columns = plan.b.kernels->panel_columns(), first_row = plan.rows.first_row(block.first_a);
  const PanelsA a = panels_a(plan, block, slice, own.a);
  PanelsB slice_b = plan.slice_b();
  // Panels that come from memory share the cache with those that are asked for meanwhile.
  const int64_t group = plan.own_b ? slice_b.group() : std::max<int64_t>(slice_b.group() / 2, 1);
  if (plan.own_b) slice_b.source = slice.of(plan, plan.b.source);
  for (int64_t group_b = block.first_b; group_b < block.last_b; group_b += group) {
    Tiles tiles{.first_b = group_b, .last_b = std::min(group_b + group, block.last_b), .slice = slice};
    if (plan.own_b) {
      slice_b.pack(group_b, tiles.last_b, own.b);
      tiles.b_panels = own.b;
      tiles.panel_units_b = slice_b.panel_units();
    } else {
      tiles.panel_units_b = plan.b.panel_units();
      tiles.b_panels = plan.b_panels + group_b * tiles.panel_units_b + slice.first * columns;
    }
    for (int64_t pa = block.first_a; pa < block.last_a; ++pa) {
      const int64_t row = plan.rows.first_row(pa) - first_row;
      const int64_t tiles_before = (pa - block.first_a) * (block.last_b - block.first_b) + group_b - block.first_b;
      tiles.pa = pa;
      tiles.a_panel = a.start + row * a.row_units + plan.rows.rows(pa) * a.skipped;
      if (plan.in_slices()) tiles.waiting = own.sums + tiles_before * plan.tile_size();
      if (!plan.own_b) tiles.turn = {pa - block.first_a, block.last_a - block.first_a, tiles.last_b < block.last_b};
      compute_tiles(plan, tiles);
    }
  }
}

void multiply_panels(const Plan& plan, const Block& block, const OwnMemory& own) {
  int64_t done = 0;
  do {
    const Slice slice = {done, std::min(plan.units - done, plan.slice_units)};
    multiply_slice(plan, block, slice, own);
    done += slice.units;
  } while (done < plan.units);
}

void run_task(const Plan& plan, int64_t task, const OwnMemory& own) {
  const int64_t blocks_P = ceil_div(plan.P(), plan.block_P);
  const int64_t first_a = task % blocks_P * plan.block_P, last_a = std::min(first_a + plan.block_P, plan.P());
  const int64_t first_b = task / blocks_P * plan.block_Q, last_b = std::min(first_b + plan.block_Q, plan.Q);
  plan.b.kernels->begin_products();
  switch (plan.in_place) {
    case InPlace::kNo:
      multiply_panels(plan, {first_a, last_a, first_b, last_b}, own);
      break;
    case InPlace::kFewAlongK:
      multiply_few(plan, first_b, last_b);
      break;
    case InPlace::kAlongK:
      multiply_along_k(plan, first_b, last_b);
      break;
    case InPlace::kAlongN:
      multiply_along_n(plan, first_b, last_b, own.b);
      break;
  }
  plan.b.kernels->end_products();
  if (plan.stream) std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores keep no order else
}

// All state of one call; kept by the calling thread so that its memory is reused.
class GroupedGemm {
 public:
  void run(std::span<const GemmProblem> problems, ThreadPool& pool) {
    cut_group(problems, pool.num_threads(), plans_);
    take_workspace(pool.num_threads());
    pack(pool);
    const int64_t num_tasks = plans_.empty() ? 0 : plans_.back().first_task + plans_.back().num_tasks;
    pool.run(num_tasks, [this](int64_t task, int thread) {
      const auto after = std::upper_bound(plans_.begin(), plans_.end(), task,
                                          [](int64_t t, const Plan& plan) { return t < plan.first_task; });
      const Plan& plan = *(after - 1);
      uint32_t* const a = own_memory_ + thread * own_units();
      uint32_t* const b = a + own_a_units_;
      run_task(plan, task - plan.first_task, {a, b, reinterpret_cast<float*>(b + own_b_units_)});
    });
  }

 private:
  void take_workspace(int num_threads) {
    own_a_units_ = own_b_units_ = own_sums_ = 0;
    size_t bytes = 0;
    for (const Plan& plan : plans_) {
      const int64_t panel_a_units = kMaxPanelRows * plan.slice_row_units();
      if (plan.own_a) own_a_units_ = std::max(own_a_units_, plan.block_P * panel_a_units);
      if (plan.in_slices()) own_sums_ = std::max(own_sums_, plan.block_P * plan.block_Q * plan.tile_size());
      if (plan.in_place == InPlace::kAlongN) own_b_units_ = std::max(own_b_units_, kMostGroupB * plan.b.panel_units());
      const PanelsB b = plan.slice_b();
      if (plan.own_b) own_b_units_ = std::max(own_b_units_, b.group() * b.panel_units());
      if (!plan.own_a) bytes += unit_bytes(plan.all_a_units());
      if (plan.packs_b_before()) bytes += unit_bytes(plan.Q * plan.b.panel_units());
    }
    own_b_units_ = whole_chunks(own_b_units_);  // keeps the threads' parts on cache lines of their own
    workspace_.reserve(bytes + unit_bytes(own_units() * num_threads) + unit_bytes(kBehindPanelsA));
    own_memory_ = take(own_units() * num_threads);
    for (Plan& plan : plans_) {
      if (!plan.own_a) plan.a_panels = take(plan.all_a_units());
      if (plan.problem->packed_b) plan.b_panels = static_cast<const uint32_t*>(plan.problem->packed_b->data());
      if (plan.packs_b_before()) plan.b_panels = take(plan.Q * plan.b.panel_units());
    }
  }
  int64_t own_units() const { return own_a_units_ + own_b_units_ + own_sums_; }  // of one thread
  static size_t unit_bytes(int64_t units) { return Workspace::padded(static_cast<size_t>(units) * sizeof(uint32_t)); }
  uint32_t* take(int64_t units) { return workspace_.take<uint32_t>(static_cast<size_t>(units)); }

  void pack(ThreadPool& pool) {
    pack_tasks_.clear();
    int64_t total = 0;  // in units that are copied
    for (const Plan& plan : plans_) {
      if (!plan.own_a) {
        total += plan.all_a_units() * (is_quantized(plan.b.type) ? kQuantizingCost : 1);
        const int64_t panels = plan.in_strips() ? plan.strips() : plan.P();
        add_pack_tasks(plan, false, panels, ceil_div(plan.all_a_units(), panels));
      }
      if (plan.packs_b_before()) {
        total += plan.Q * plan.b.panel_units();
        add_pack_tasks(plan, true, plan.Q, plan.b.panel_units());
      }
    }
    if (total <= kInlinePackUnits) {
      for (const PackTask& task : pack_tasks_) task.run();
    } else {
      pool.run(static_cast<int64_t>(pack_tasks_.size()), [this](int64_t i, int) { pack_tasks_[i].run(); });
    }
  }

  void add_pack_tasks(const Plan& plan, bool is_b, int64_t panels, int64_t panel_units) {
    const int64_t step = std::max<int64_t>(1, kInlinePackUnits / std::max<int64_t>(panel_units, 1));
    for (int64_t p = 0; p < panels; p += step) pack_tasks_.push_back({&plan, is_b, p, std::min(p + step, panels)});
  }

  std::vector<Plan> plans_;
  std::vector<PackTask> pack_tasks_;
  Workspace workspace_;
  int64_t own_a_units_ = 0, own_b_units_ = 0, own_sums_ = 0;  // of one thread
  uint32_t* own_memory_ = nullptr;
};

}  // namespace

void quantize_rows(const ConstMatrix& a, PanelType type, uint32_t* rows, ThreadPool& pool) {
  COTERIE_CHECK(is_quantized(type) && a.col_stride == 1, "A is not of a kind that is quantized");
  const PackSource source = {a.data, a.dtype, a.rows, a.cols, a.row_stride};
  const RowPanels panels = {a.rows, a.rows};  // of one row each
  const int64_t units = a_row_units(type, a.cols);
  parallel_rows(a.rows, kQuantizingCost * units, pool,
                [&](int64_t row) { active_kernels().pack_a(source, type, panels, row, row + 1, rows + row * units); });
}

void grouped_gemm(std::span<const GemmProblem> problems, ThreadPool& pool) {
  static thread_local GroupedGemm state;
  state.run(problems, pool);
}

}  // namespace coterie
