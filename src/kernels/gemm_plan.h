// How a group of products is cut up.
//
// A tile of C is one panel of A (up to panel_rows rows) times one panel of B (2 vectors of columns). A task
// is a block of panels of A, small enough for half of an L2 cache, times a block of panels of B: a panel of
// B is read once per block, lies in the L1 or L2 cache meanwhile, and A comes from L2.
//
// An operand that is not in panels yet is packed where it costs least: by the task that uses it, straight
// into the cache, when no other task needs the same part; else beforehand, once for all tasks. With few rows of
// A, B is not packed at all but read where it lies (multiply_in_place.inl), by tasks that take all rows of A.
//
// A long K is multiplied in slices, or the few panels that fit into a cache would be read too often for what is done
// with them. Meanwhile sums wait in fp32, which changes no bit of them.
//
// Sums become a part of C by way of a tile and its epilogue; those of short K that C takes as they are, or with bias,
// straight from registers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/round.h"
#include "kernels/gemm.h"
#include "kernels/kernel_table.h"

namespace coterie {

// Panels of B that a task packs or multiplies at once, at most.
inline constexpr int64_t kMostGroupB = 8;
// Packing less than this many units is not worth waking the other threads for.
inline constexpr int64_t kInlinePackUnits = 32 << 10;
// To quantize a unit of A, four elements, takes as long as packing so many.
inline constexpr int64_t kQuantizingCost = 8;

// K of more than kMostUnitsAtOnce is cut into slices of at most kMostUnitsOfSlice.
inline constexpr int64_t kMostUnitsAtOnce = 4096, kMostUnitsOfSlice = 2048;

// The panels of B. Panel p holds columns [p * width(), ...) of C.
struct PanelsB {
  const KernelTable* kernels;
  PackSource source;
  PanelType type;
  bool gated;
  bool compact;
  int64_t N;  // columns of C

  int64_t width() const { return gated ? kernels->width : kernels->panel_columns(); }
  int64_t count() const { return ceil_div(N, width()); }
  int64_t panel_units() const {
    return compact ? compact_panel().size() : b_panel_units(type, source.cols, kernels->panel_columns());
  }
  CompactPanel compact_panel() const { return {source.cols, kernels->panel_columns()}; }
  int64_t group() const;  // panels to pack or to multiply at once
  void pack(int64_t first, int64_t last, uint32_t* memory) const;
};

// How B is read where it lies: not at all; with K contiguous, A being one panel of a few rows, or in strips; or with
// columns contiguous.
enum class InPlace { kNo, kFewAlongK, kAlongK, kAlongN };

// A problem with its cut.
struct Plan {
  const GemmProblem* problem;
  PanelsB b;
  PackSource a;
  RowPanels rows;
  int64_t units;             // of K
  int64_t slice_units;       // of K that a task multiplies at once; whole chunks where that is not all
  int64_t Q;                 // panels of B
  int64_t block_P, block_Q;  // panels of a task
  int64_t first_task, num_tasks;
  bool stream;                   // C past the caches
  bool into_rows;                // sums become C without a tile between
  bool own_a, own_b;             // tasks pack the operand themselves
  InPlace in_place;              // few rows of A: they are packed beforehand, and B is read where it lies
  uint32_t* a_panels = nullptr;  // all of A, unless own_a
  const uint32_t* b_panels = nullptr;

  int64_t P() const { return rows.P; }
  int64_t row_units() const { return b.kernels->a_row_units(b.type, a.cols); }  // of A, in panels
  bool in_slices() const { return slice_units < units; }
  int64_t slice_cols() const { return in_slices() ? slice_units * elements_of_unit(b.type) : a.cols; }
  int64_t slice_row_units() const { return b.kernels->a_row_units(b.type, slice_cols()); }
  PanelsB slice_b() const;  // B as long as a slice
  // Floats of a tile that waits: kernels may store rows that are not there (see kernel_table.h).
  int64_t tile_size() const { return kMaxPanelRows * b.kernels->panel_columns(); }
  int64_t a_units(int64_t first, int64_t last) const {
    return (rows.first_row(last) - rows.first_row(first)) * row_units();
  }
  bool in_strips() const { return in_place == InPlace::kAlongK; }
  int64_t strips() const { return ceil_div(rows.M, b.kernels->width); }
  int64_t strip_units() const { return b.kernels->width * a_row_units(b.type, a.cols); }  // never widened
  int64_t all_a_units() const { return in_strips() ? strips() * strip_units() : rows.M * row_units(); }
  bool packs_b_before() const { return !problem->packed_b && !own_b && in_place == InPlace::kNo; }
  double cost(int64_t panels_a, int64_t panels_b) const;  // in multiply-adds
};

// Columns [first, first + cols) of an operand, or up to the last one.
PackSource columns_of(PackSource source, int64_t first, int64_t cols);

// Cuts a group for `num_threads` threads. Problems without rows or columns have no task and get no plan.
void cut_group(std::span<const GemmProblem> problems, int num_threads, std::vector<Plan>& plans);

}  // namespace coterie
