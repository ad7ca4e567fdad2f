// C = A * B^T, dense and grouped, the one matrix product that everything here is made of.
// Legend: M rows of A, K reduced, N columns of C. B is [N, K], as weights are stored ([out, in]).
//
// Arithmetic: both operands are converted to one type, B's unless another is given, products are accumulated in fp32
// over all of K, and C is rounded once, at the end. The order of accumulation depends on K and the ISA alone, never on
// M, threads or neighbours: a row has the same bits alone and in a batch.
//
// With few rows of A, a B of that type is read once and where it lies: with contiguous rows up to 64 rows of A, with
// contiguous columns up to 8 in fp32, or 16 in bf16 where a group's B fit into the caches. Otherwise B is packed into
// panels on the way, which many rows of A pay for; or it comes packed.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/activation.h"
#include "kernels/matrix.h"

namespace coterie {

struct KernelTable;

// B [N, K] rearranged into the panels that the micro-kernel of the active ISA reads in order.
// Immutable after packing; may be read by any number of threads. With `gated`, B is [2N, K], gate rows
// first, and only fits problems that are gated too: a panel then holds gate and up of the same columns.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  PackedMatrix(const ConstMatrix& b, ThreadPool& pool, bool gated = false);  // any strides

  int64_t rows() const { return rows_; }  // of B: N, or 2N when gated
  int64_t cols() const { return cols_; }  // K
  DType dtype() const { return dtype_; }
  bool gated() const { return gated_; }
  const KernelTable* kernels() const { return kernels_; }  // whose panels these are
  const void* data() const { return panels_.data(); }
  size_t bytes() const { return panels_.size(); }

 private:
  AlignedBuffer panels_;
  const KernelTable* kernels_ = nullptr;
  bool gated_ = false;
  DType dtype_ = DType::kF32;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
};

// One product of a group. Exactly one of b and packed_b is given.
struct GemmProblem {
  ConstMatrix a = {};                      // [M, K], or the matrix that gather_M reads rows of
  const int32_t* gather_M = nullptr;       // row i of A is a.row(gather_M[i]); a.rows counts the source rows
  int64_t num_gathered = 0;                // M when gather_M is given
  ConstMatrix b = {};                      // [N, K]
  const int32_t* b_gather_K = nullptr;     // column k of B is b.column(b_gather_K[k]); K is a.cols then
  const PackedMatrix* packed_b = nullptr;  // [N, K]
  std::optional<DType> panels = {};        // what both operands are converted to; B's type unless given
  Matrix c = {};                           // [M, N]
  const float* bias_N = nullptr;           // added to every row
  Activation activation = Activation::kNone;
  bool gated = false;       // B is [2N, K], gate rows first, then up rows: c = activation(gate) * up, [M, N]
  bool accumulate = false;  // c += instead of c = (not with activation or gated)
  Matrix pre = {};          // when it has data: the sums plus bias before the activation, [M, rows of B], of C's type
};

// The problems are independent of each other (their C don't overlap) and are cut into tiles for the
// pool together, so that a few large and many small ones fill all threads. M = 0 or K = 0 is fine
// (K = 0 gives bias or zeros).
void grouped_gemm(std::span<const GemmProblem> problems, ThreadPool& pool);

inline void gemm(const GemmProblem& problem, ThreadPool& pool) { grouped_gemm({&problem, 1}, pool); }

}  // namespace coterie
