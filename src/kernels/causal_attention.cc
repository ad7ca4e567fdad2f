// A task of the forward pass is a block of queries of one head, with all keys that they see. A task of the backward
// pass is a sequence's group of heads, which share a key head: it sums the gradients of keys and values alone.
// Within a task, queries go panel by panel through scores, and what lies above the diagonal is left out by whole
// panels and chunks; the rest of it is zero.
#include "kernels/causal_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/panel_product.h"
#include "kernels/workspace.h"

namespace coterie {

float CausalShape::scale() const { return 1.0f / std::sqrt(static_cast<float>(d)); }

namespace {

// Queries whose weights a task holds at once. At S = 256 and d = 64 all of a backward task's memory, 0.8 MB in bf16
// (1.0 where it is widened), stays in the L2 cache.
constexpr int64_t kBlock = 256;

ConstMatrix transposed_block(const ConstMatrix& m, int64_t first, int64_t count) {
  return m.row_range(first, count).transposed();
}

// Columns [first, first + count) of a row-major matrix.
ConstMatrix column_range(const ConstMatrix& m, int64_t first, int64_t count) {
  const auto* const data = static_cast<const char*>(m.data) + first * static_cast<int64_t>(dtype_size(m.dtype));
  return {data, m.dtype, m.rows, count, m.row_stride, m.col_stride};
}
Matrix column_range(const Matrix& m, int64_t first, int64_t count) {
  auto* const data = static_cast<char*>(m.data) + first * static_cast<int64_t>(dtype_size(m.dtype));
  return {data, m.dtype, m.rows, count, m.row_stride};
}

char* row_of(const Matrix& m, int64_t row) { return static_cast<char*>(m.row_range(row, 1).data); }

// Elements [first, last) of a row.
void clear(const Matrix& m, int64_t row, int64_t first, int64_t last) {
  const auto size = static_cast<int64_t>(dtype_size(m.dtype));
  if (last > first) std::memset(row_of(m, row) + first * size, 0, static_cast<size_t>((last - first) * size));
}

// The columns of one sequence and one head, [S, d] each.
struct Heads {
  const CausalShape& shape;

  template <typename M>
  M part(const M& m, int64_t b, int64_t head) const {
    return column_range(m.row_range(b * shape.S, shape.S), head * shape.d, shape.d);
  }
  template <typename M>
  M q(const M& qkv, int64_t b, int64_t h) const {
    return part(qkv, b, h);
  }
  template <typename M>
  M k(const M& qkv, int64_t b, int64_t g) const {
    return part(qkv, b, shape.H + g);
  }
  template <typename M>
  M v(const M& qkv, int64_t b, int64_t g) const {
    return part(qkv, b, shape.H + shape.G + g);
  }
};

// A thread's memory, handed out in order; first counted, then taken.
class Memory {
 public:
  explicit Memory(char* memory) : memory_(memory) {}

  uint32_t* units(int64_t count) { return reinterpret_cast<uint32_t*>(bytes(count * 4)); }
  Matrix matrix(DType dtype, int64_t rows, int64_t cols) {
    return row_major(static_cast<void*>(bytes(rows * cols * static_cast<int64_t>(dtype_size(dtype)))), dtype, rows,
                     cols);
  }
  size_t used() const { return used_; }

 private:
  char* bytes(int64_t count) {
    char* const part = memory_ + used_;
    used_ += Workspace::padded(static_cast<size_t>(count));
    return part;
  }
  char* memory_;
  size_t used_ = 0;
};

// Runs task(index, memory) with a Buffers of every thread's own.
template <typename Buffers, typename Task>
void run_with_buffers(const CausalShape& shape, const PanelProduct& product, int64_t num_tasks, ThreadPool& pool,
                      const Task& task) {
  static thread_local Workspace workspace;
  Memory counted(nullptr);
  const Buffers counting(shape, product, counted);
  const size_t bytes = counted.used();
  workspace.reserve(bytes * static_cast<size_t>(pool.num_threads()));
  char* const memory = workspace.take<char>(bytes * static_cast<size_t>(pool.num_threads()));
  pool.run(num_tasks, [&](int64_t index, int thread) {
    Memory own(memory + bytes * static_cast<size_t>(thread));
    product.kernels.begin_products();
    task(index, Buffers(shape, product, own));
    product.kernels.end_products();
  });
}

struct ForwardBuffers {
  uint32_t *q, *k, *v, *weights_a;
  Matrix scores, weights, sums;  // of a panel of queries; sums of values

  ForwardBuffers(const CausalShape& s, const PanelProduct& product, Memory& memory) {
    const int64_t rows = product.most_rows();
    q = memory.units(product.size_of_a(std::min(kBlock, s.S), s.d));
    k = memory.units(product.size_of_b(s.S, s.d));
    v = memory.units(product.size_of_b(s.d, s.S));
    weights_a = memory.units(product.size_of_a(rows, s.S));
    scores = memory.matrix(DType::kF32, rows, s.S);
    weights = memory.matrix(product.type, rows, s.S);
    sums = memory.matrix(DType::kF32, rows, s.d);
  }
};

struct Forward {
  const CausalShape& shape;
  const ConstMatrix& qkv_TC;
  const Matrix& out;
  float* logsumexp_BHS;
  PanelProduct product;

  // Queries [first, first + count) of head h.
  void run(int64_t b, int64_t h, int64_t first, int64_t count, const ForwardBuffers& buffers) const {
    const Heads heads{shape};
    const int64_t g = h / (shape.H / shape.G), seen = first + count;
    const PanelsOfB k = product.pack_b(heads.k(qkv_TC, b, g).row_range(0, seen), buffers.k);
    const PanelsOfB v = product.pack_b(transposed_block(heads.v(qkv_TC, b, g), 0, seen), buffers.v);
    const PanelsOfA q = product.pack_a(heads.q(qkv_TC, b, h).row_range(first, count), buffers.q);
    float* const logsumexp_S = logsumexp_BHS + (b * shape.H + h) * shape.S;
    const Matrix out_Sd = heads.part(out, b, h);
    for (int64_t p = 0; p < q.rows.P; ++p) panel(q, p, first + q.rows.first_row(p), k, v, out_Sd, logsumexp_S, buffers);
  }

  void panel(const PanelsOfA& q, int64_t p, int64_t first, const PanelsOfB& k, const PanelsOfB& v, const Matrix& out_Sd,
             float* logsumexp_S, const ForwardBuffers& buffers) const {
    const int64_t rows = q.rows.rows(p), seen = first + rows;
    float sums[kMaxPanelRows];
    product.multiply(q, p, k, 0, shape.d, column_range(buffers.scores, 0, seen), false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i + 1;
      const auto* const scores = reinterpret_cast<const float*>(row_of(buffers.scores, i));
      const SoftmaxSum softmax =
          product.kernels.exponentials_row(scores, n, shape.scale(), row_of(buffers.weights, i), product.type);
      clear(buffers.weights, i, n, seen);
      sums[i] = softmax.sum;
      logsumexp_S[first + i] = shape.scale() * softmax.maximum + std::log(softmax.sum);
    }
    const ConstMatrix weights = column_range(buffers.weights, 0, seen).row_range(0, rows);
    product.multiply(product.pack_a(weights, buffers.weights_a), 0, v, 0, seen, buffers.sums, false);
    for (int64_t i = 0; i < rows; ++i) {
      product.kernels.scale_row(row_of(buffers.sums, i), DType::kF32, 1.0f / sums[i], row_of(out_Sd, first + i),
                                out.dtype, shape.d);
    }
  }
};

struct BackwardBuffers {
  uint32_t *k, *v, *k_transposed, *q, *grad_out, *q_transposed, *grad_out_transposed, *weights_a;
  Matrix scores, grad_weights;  // of a panel of queries
  Matrix weights, grad_scores;  // of a block of queries
  Matrix grad_k, grad_v;        // sums over a group

  BackwardBuffers(const CausalShape& s, const PanelProduct& product, Memory& memory) {
    const int64_t block = std::min(kBlock, s.S), rows = product.most_rows();
    k = memory.units(product.size_of_b(s.S, s.d));
    v = memory.units(product.size_of_b(s.S, s.d));
    k_transposed = memory.units(product.size_of_b(s.d, s.S));
    q = memory.units(product.size_of_a(block, s.d));
    grad_out = memory.units(product.size_of_a(block, s.d));
    q_transposed = memory.units(product.size_of_b(s.d, block));
    grad_out_transposed = memory.units(product.size_of_b(s.d, block));
    weights_a = memory.units(std::max(product.size_of_a(s.S, block), product.size_of_a(block, s.S)));
    scores = memory.matrix(DType::kF32, rows, s.S);
    grad_weights = memory.matrix(DType::kF32, rows, s.S);
    weights = memory.matrix(product.type, block, s.S);
    grad_scores = memory.matrix(product.type, block, s.S);
    grad_k = memory.matrix(DType::kF32, s.S, s.d);
    grad_v = memory.matrix(DType::kF32, s.S, s.d);
  }
};

// With P the weights, g the gradient of the output and delta = P . grad P of each query:
//   grad V = P^T g,  grad P = g V^T,  grad scores = P (grad P - delta) scale,
//   grad Q = grad scores K,  grad K = grad scores^T Q.
struct Backward {
  const CausalShape& shape;
  const ConstMatrix& qkv_TC;
  const float* logsumexp_BHS;
  const ConstMatrix& grad_out;
  const Matrix& grad_qkv_TC;
  PanelProduct product;

  // All heads that share key head g.
  void run(int64_t b, int64_t g, const BackwardBuffers& buffers) const {
    const Heads heads{shape};
    const ConstMatrix k_Sd = heads.k(qkv_TC, b, g);
    const PanelsOfB k = product.pack_b(k_Sd, buffers.k);
    const PanelsOfB v = product.pack_b(heads.v(qkv_TC, b, g), buffers.v);
    const PanelsOfB k_transposed = product.pack_b(k_Sd.transposed(), buffers.k_transposed);
    for (int64_t s = 0; s < shape.S; ++s) {
      clear(buffers.grad_k, s, 0, shape.d);
      clear(buffers.grad_v, s, 0, shape.d);
    }
    const int64_t heads_per_group = shape.H / shape.G;
    for (int64_t h = g * heads_per_group; h < (g + 1) * heads_per_group; ++h) {
      for (int64_t first = 0; first < shape.S; first += kBlock) {
        block(b, h, first, std::min(kBlock, shape.S - first), k, v, k_transposed, buffers);
      }
    }
    store(buffers.grad_k, heads.k(grad_qkv_TC, b, g));
    store(buffers.grad_v, heads.v(grad_qkv_TC, b, g));
  }

  // Queries [first, first + count) of head h.
  void block(int64_t b, int64_t h, int64_t first, int64_t count, const PanelsOfB& k, const PanelsOfB& v,
             const PanelsOfB& k_transposed, const BackwardBuffers& buffers) const {
    const Heads heads{shape};
    const int64_t seen = first + count;
    const ConstMatrix q_Sd = heads.q(qkv_TC, b, h), grad_out_Sd = heads.part(grad_out, b, h);
    weigh(b, h, first, product.pack_a(q_Sd.row_range(first, count), buffers.q),
          product.pack_a(grad_out_Sd.row_range(first, count), buffers.grad_out), k, v, buffers);

    const Matrix weights = column_range(buffers.weights, 0, seen).row_range(0, count);
    const Matrix grad_scores = column_range(buffers.grad_scores, 0, seen).row_range(0, count);
    const Matrix grad_q = heads.q(grad_qkv_TC, b, h).row_range(first, count);
    const PanelsOfA by_query = product.pack_a(grad_scores, buffers.weights_a);
    for (int64_t p = 0; p < by_query.rows.P; ++p) {
      const int64_t row = by_query.rows.first_row(p), rows = by_query.rows.rows(p);
      product.multiply(by_query, p, k_transposed, 0, first + row + rows, grad_q.row_range(row, rows), false);
    }
    add_by_key(grad_scores, product.pack_b(transposed_block(q_Sd, first, count), buffers.q_transposed), first,
               buffers.grad_k, buffers);
    add_by_key(weights, product.pack_b(transposed_block(grad_out_Sd, first, count), buffers.grad_out_transposed), first,
               buffers.grad_v, buffers);
  }

  // The weights of a block of queries, and the gradients of their scores.
  void weigh(int64_t b, int64_t h, int64_t first, const PanelsOfA& q, const PanelsOfA& grad_out_a, const PanelsOfB& k,
             const PanelsOfB& v, const BackwardBuffers& buffers) const {
    for (int64_t p = 0; p < q.rows.P; ++p) {
      const int64_t row = q.rows.first_row(p), rows = q.rows.rows(p), seen = first + row + rows;
      product.multiply(q, p, k, 0, shape.d, column_range(buffers.scores, 0, seen), false);
      product.multiply(grad_out_a, p, v, 0, shape.d, column_range(buffers.grad_weights, 0, seen), false);
      for (int64_t i = 0; i < rows; ++i) weigh_row(b, h, first, row + i, i, first + q.rows.M, buffers);
    }
  }

  // Row i of the panel is row `row` of the block.
  void weigh_row(int64_t b, int64_t h, int64_t first, int64_t row, int64_t i, int64_t width,
                 const BackwardBuffers& buffers) const {
    const int64_t s = first + row;
    product.kernels.attention_backward_row(
        {.scores = reinterpret_cast<float*>(row_of(buffers.scores, i)),
         .grad_weights = reinterpret_cast<const float*>(row_of(buffers.grad_weights, i)),
         .weights = row_of(buffers.weights, row),
         .grad_scores = row_of(buffers.grad_scores, row),
         .dtype = product.type,
         .n = s + 1,
         .scale = shape.scale(),
         .logsumexp = logsumexp_BHS[(b * shape.H + h) * shape.S + s]});
    clear(buffers.weights, row, s + 1, width);
    clear(buffers.grad_scores, row, s + 1, width);
  }

  // sums [keys, d] += weights^T * the block's rows of queries or of gradients.
  void add_by_key(const Matrix& weights, const PanelsOfB& rows_of_block, int64_t first, const Matrix& sums,
                  const BackwardBuffers& buffers) const {
    const PanelsOfA by_key = product.pack_a(ConstMatrix(weights).transposed(), buffers.weights_a);
    for (int64_t p = 0; p < by_key.rows.P; ++p) {
      const int64_t key = by_key.rows.first_row(p);  // queries before it don't see it
      product.multiply(by_key, p, rows_of_block, std::max<int64_t>(0, key - first), weights.rows,
                       sums.row_range(key, by_key.rows.rows(p)), true);
    }
  }

  void store(const Matrix& sums, const Matrix& grad) const {
    for (int64_t s = 0; s < shape.S; ++s) {
      product.kernels.convert_row(row_of(sums, s), DType::kF32, row_of(grad, s), grad.dtype, shape.d);
    }
  }
};

// `out` or its gradient.
void check_shapes(const CausalShape& s, const ConstMatrix& qkv, const ConstMatrix& out) {
  COTERIE_CHECK(s.G > 0 && s.H % s.G == 0, "query heads are no multiple of key heads");
  COTERIE_CHECK(qkv.rows == s.num_tokens() && qkv.cols == s.columns() && qkv.col_stride == 1, "qkv has another shape");
  COTERIE_CHECK(out.rows == s.num_tokens() && out.cols == s.H * s.d && out.col_stride == 1, "out has another shape");
}

}  // namespace

void causal_attention(const CausalShape& shape, const ConstMatrix& qkv_TC, const Matrix& out, float* logsumexp_BHS,
                      ThreadPool& pool) {
  check_shapes(shape, qkv_TC, out);
  const Forward forward{shape, qkv_TC, out, logsumexp_BHS, {active_kernels(), qkv_TC.dtype}};
  const int64_t blocks = (shape.S + kBlock - 1) / kBlock, heads = shape.B * shape.H;
  run_with_buffers<ForwardBuffers>(
      shape, forward.product, blocks * heads, pool, [&](int64_t task, const ForwardBuffers& buffers) {
        // The last queries see the most keys: they go first, so that no long task is left for the end.
        const int64_t first = (blocks - 1 - task / heads) * kBlock;
        forward.run(task % heads / shape.H, task % shape.H, first, std::min(kBlock, shape.S - first), buffers);
      });
}

void causal_attention_backward(const CausalShape& shape, const ConstMatrix& qkv_TC, const float* logsumexp_BHS,
                               const ConstMatrix& grad_out, const Matrix& grad_qkv_TC, ThreadPool& pool) {
  check_shapes(shape, qkv_TC, grad_out);
  check_shapes(shape, grad_qkv_TC, grad_out);
  const Backward backward{shape, qkv_TC, logsumexp_BHS, grad_out, grad_qkv_TC, {active_kernels(), qkv_TC.dtype}};
  run_with_buffers<BackwardBuffers>(
      shape, backward.product, shape.B * shape.G, pool,
      [&](int64_t task, const BackwardBuffers& buffers) { backward.run(task / shape.G, task % shape.G, buffers); });
}

}  // namespace coterie
