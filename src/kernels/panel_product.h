// Products inside one task, of operands that the task packs itself: what attention is made of. The panels and the
// micro-kernels are those of gemm.h, and so is the arithmetic. Legend: M rows of A, N columns of C, K reduced.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernel_table.h"
#include "kernels/matrix.h"

namespace coterie {

struct PanelsOfA {
  RowPanels rows;
  int64_t row_units = 0;  // of a row, padded
  const uint32_t* data = nullptr;
};

struct PanelsOfB {
  int64_t panel_units = 0;
  const uint32_t* data = nullptr;
};

// C = A * B^T, with both operands packed as `type`. One thread.
struct PanelProduct {
  const KernelTable& kernels;
  DType type;

  int64_t most_rows() const { return kernels.panel_rows[index_of(panel_type(type))]; }
  int64_t num_panels_a(int64_t M) const { return (M + most_rows() - 1) / most_rows(); }
  int64_t row_units(int64_t K) const { return kernels.a_row_units(panel_type(type), K); }  // of A
  // Memory, in units, that packing takes.
  int64_t size_of_a(int64_t M, int64_t K) const { return whole_chunks(M * row_units(K) + kBehindPanelsA); }
  int64_t size_of_b(int64_t N, int64_t K) const { return num_panels_b(N) * panel_units(K); }

  PanelsOfA pack_a(const ConstMatrix& a, uint32_t* memory) const {
    const RowPanels rows = {a.rows, num_panels_a(a.rows)};
    kernels.pack_a(source(a), panel_type(type), rows, 0, rows.P, memory);
    return {rows, row_units(a.cols), memory};
  }
  PanelsOfB pack_b(const ConstMatrix& b, uint32_t* memory) const {
    kernels.pack_b(source(b), panel_type(type), b.rows, /*gated=*/false, 0, num_panels_b(b.rows), memory);
    return {panel_units(b.cols), memory};
  }

  // C [the rows of panel p of A, N] from the columns [first_k, last_k) of A and B, or from some before first_k too:
  // whole chunks are cheaper, so the caller sees to it that A is zero there. It must be zero behind last_k, too, up
  // to the next chunk. N may be less than B has rows.
  void multiply(const PanelsOfA& a, int64_t p, const PanelsOfB& b, int64_t first_k, int64_t last_k, const Matrix& c,
                bool accumulate) const {
    alignas(64) float tile[kMaxPanelRows * kMaxPanelColumns];
    const int rows = a.rows.rows(p);
    const int64_t width = kernels.panel_columns();
    const int64_t first_unit = (type == DType::kBF16 ? first_k / 2 : first_k) / kChunkUnits * kChunkUnits;
    const int64_t units = units_of(panel_type(type), last_k) - first_unit;
    const int64_t first_of_a = kernels.a_units(panel_type(type), first_unit);
    const uint32_t* const a_panel = a.data + a.rows.first_row(p) * a.row_units + first_of_a * rows;
    TileStore store = {.tile = tile, .rows = rows, .c_dtype = c.dtype, .c_stride = c.row_stride};
    store.accumulate = accumulate;
    for (int64_t column = 0; column < c.cols; column += width) {
      const uint32_t* const b_panel = b.data + column / width * b.panel_units + first_unit * width;
      const Ahead ahead = ahead_in_panel(b_panel, width, units_ahead(rows));
      kernels.multiply[type == DType::kBF16][rows - 1](units, a_panel, b_panel, ahead, tile, /*add=*/false);
      store.cols = std::min(width, c.cols - column);
      store.c = static_cast<char*>(c.data) + column * static_cast<int64_t>(dtype_size(c.dtype));
      kernels.store_tile(store);
    }
  }

 private:
  int64_t panel_units(int64_t K) const { return b_panel_units(panel_type(type), K, kernels.panel_columns()); }
  int64_t num_panels_b(int64_t N) const { return (N + kernels.panel_columns() - 1) / kernels.panel_columns(); }
  static PackSource source(const ConstMatrix& m) {
    return {.data = m.data,
            .dtype = m.dtype,
            .rows = m.rows,
            .cols = m.cols,
            .row_stride = m.row_stride,
            .col_stride = m.col_stride};
  }
};

}  // namespace coterie
