// C = A * B^T, dense and grouped, the one matrix product that everything here is made of.
// Legend: M rows of A, K reduced, N columns of C. B is [N, K], as weights are stored ([out, in]).
//
// Arithmetic: both operands are converted to one type, B's unless another is given, products are accumulated in fp32
// over all of K, and C is rounded once, at the end (denormals of bf16 may become zero). The order of accumulation
// depends on K and the ISA alone, never on M, threads or neighbours: a row has the same bits alone and in a batch.
//
// With few rows of A, a B of that type is read once and where it lies: with contiguous rows up to 64 rows of A (in
// bf16, where an ISA has no products of it, up to few_rows of the table), with contiguous columns up to 8 in fp32, or
// 16 in bf16 where a group's B fit into the caches. Otherwise B is packed into panels on the way, which many rows of A
// pay for; or it comes packed.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "base/thread_pool.h"
#include "kernels/activation.h"
#include "kernels/matrix.h"
#include "kernels/packed_matrix.h"

namespace coterie {

// One product of a group. Exactly one of b and packed_b is given.
struct GemmProblem {
  ConstMatrix a = {};                     // [M, K], or the matrix that gather_M reads rows of
  const uint32_t* quantized_a = nullptr;  // its rows as quantize_rows leaves them; a gives their shape alone
  const int32_t* gather_M = nullptr;      // row i of A is a.row(gather_M[i]); a.rows counts the source rows
  int64_t num_gathered = 0;               // M when gather_M is given
  ConstMatrix b = {};                     // [N, K]
  // Column k of A is a.column(a_gather_K[k]), and K is b.cols then; or that of B likewise, with K = a.cols.
  const int32_t* a_gather_K = nullptr;
  const int32_t* b_gather_K = nullptr;
  const PackedMatrix* packed_b = nullptr;  // [N, K]
  int64_t K() const { return a_gather_K ? b.cols : a.cols; }
  std::optional<DType> panels = {};  // what both operands are converted to; B's type unless given
  Matrix c = {};                     // [M, N]
  const float* bias_N = nullptr;     // added to every row
  Activation activation = Activation::kNone;
  bool gated = false;       // B is [2N, K], gate rows first, then up rows: c = activation(gate) * up, [M, N]
  bool accumulate = false;  // c += instead of c = (not with activation or gated)
  // When it has data: the derivatives of C by the sums (with bias) before the activation, [M, rows of B], of C's type;
  // when gated by gate and up, each with the other inside: [f'(gate) up; f(gate)].
  Matrix slopes = {};
};

// The problems are independent of each other (their C don't overlap) and are cut into tiles for the
// pool together, so that a few large and many small ones fill all threads. M = 0 or K = 0 is fine
// (K = 0 gives bias or zeros).
void grouped_gemm(std::span<const GemmProblem> problems, ThreadPool& pool);

// The rows of a, whose K is contiguous, as products with B of a quantized type take them: for rows that take part in
// several. Memory of a.rows * a_row_units(type, a.cols) units.
void quantize_rows(const ConstMatrix& a, PanelType type, uint32_t* rows, ThreadPool& pool);

inline void gemm(const GemmProblem& problem, ThreadPool& pool) { grouped_gemm({&problem, 1}, pool); }

}  // namespace coterie
