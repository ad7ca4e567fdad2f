// The functions that are compiled once per instruction set (ISA), and the one place where an ISA is
// chosen. Every function runs on one thread, on raw pointers, allocates nothing and cannot fail; the
// files beside this one check arguments, cut the work into tasks and call through the table.
//
// The best table that the CPU runs is chosen at first use. COTERIE_ISA=generic|avx2|avx512|avx512_bf16|amx forces one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/dtype.h"
#include "kernels/activation.h"
#include "kernels/panels.h"
#include "kernels/quantized.h"

namespace coterie {

// A matrix to pack: element (r, k) is data[row(r) * row_stride + column(k) * col_stride], where
// row(r) = gather_rows ? gather_rows[r] : r, and column(k) likewise.
struct PackSource {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;  // rows that may be read, counted after gathering
  int64_t cols = 0;  // K
  int64_t row_stride = 0;
  int64_t col_stride = 1;
  const int32_t* gather_rows = nullptr;
  const int32_t* gather_cols = nullptr;
  const uint32_t* quantized = nullptr;  // instead of data: every row as a panel of its own (of A, of a quantized type)
};

// Rows of A that multiply_few takes on some ISA.
inline constexpr int kMostFewRows = 12;
// Units of K that multiply_along_n takes at a time.
inline constexpr int64_t kPartUnits = 4 * kChunkUnits;

// A panel of B where it lies, of the panels' type, as a product with few rows of A reads it: two vectors of columns
// of C. When gated, the first are the gate and the second up.
struct PanelInPlace {
  const void* start[2] = {};  // the first column's first element
  int count[2] = {};          // columns that are there, at most width; the sums of others are never looked at
  int64_t stride_bytes = 0;   // along K: from a column to the next; along N: from an element of K to the next
  int64_t cols = 0;           // K
  int64_t columns_ahead = 0;  // along K: the panel to ask for meanwhile begins so many columns behind; 0: none

  // Along K, what to ask for while byte `at` of a column is read, from the column's start: what comes soon, in this
  // panel or the next. All columns together are a good part of an L1 cache ahead, and a small one of an L2.
  int64_t byte_ahead(int64_t column_bytes, int64_t at) const {
    constexpr int64_t kMostAhead = 2048;
    const int64_t next = at + (column_bytes < kMostAhead ? column_bytes : kMostAhead);
    return next < column_bytes ? next : columns_ahead * stride_bytes + next - column_bytes;
  }
};

// What happens to a finished tile of products on its way to C. Columns are those of the tile; when
// gated, the first vector of the tile is the gate and the second is up, for the same columns of C.
struct TileStore {
  const float* tile = nullptr;  // [rows][2 * width]
  int64_t rows = 0;
  int64_t cols = 0;  // columns of C, at most 2 * width (width when gated)
  void* c = nullptr;
  DType c_dtype = DType::kF32;
  int64_t c_stride = 0;
  void* slopes = nullptr;  // also receives the slopes, see GemmProblem; null: not wanted
  int64_t slopes_stride = 0;
  int64_t slopes_up_offset = 0;    // from a gate element to its up element
  const float* bias = nullptr;     // of the tile's first column, or null
  const float* bias_up = nullptr;  // when gated
  Activation activation = Activation::kNone;
  bool gated = false;
  bool accumulate = false;
  bool stream = false;  // C is so large that it would push everything else out of the caches
};

// Queries against a run of n consecutive keys. Keys and values come in groups of rows, of fp32 or of what a KV cache
// holds; or the keys in panels. What was added to queries and keys to reach kPadding is zero.
struct AttendStep {
  static constexpr int64_t kGroupRows = 16;
  static constexpr int64_t kRunKeys = 64;  // most keys of a run
  static constexpr int64_t kMostTileQueries = 4;
  static constexpr int64_t kPadding = 32;  // d and v are multiples of it

  struct Keys {
    int64_t first = 0, last = 0;
    bool empty() const { return first >= last; }
  };

  // Groups that are asked for meanwhile, row by row as those of the run are read. Null where there is none.
  struct Coming {
    const void* const* groups = nullptr;
    const float* const* factors = nullptr;
    int64_t row_bytes = 0;
  };

  const uint32_t* q = nullptr;       // [queries][d] of kF32 or kBF16; with kI8 integers of 16 bits
  const float* q_factors = nullptr;  // [queries], of the integers; null: ones
  int64_t queries = 0;               // `heads` of each token
  int64_t heads = 1;
  int64_t position = 0;                    // of the first token, counted from the first key; may be below it
  int64_t window = 0;                      // a token sees so many keys, its own the last of them; 0: all
  DType dtype = DType::kF32;               // of keys and values: kF32, kBF16 or kI8
  const uint32_t* key_panels = nullptr;    // null, or all keys [n, d] as panels of B: fp32, bf16, or 16-bit integers
  const uint32_t* value_panels = nullptr;  // then values^T [v, n] likewise
  int64_t key_panel_units = 0, value_panel_units = 0;  // of one panel
  const void* const* keys = nullptr;            // else groups [kGroupRows][d]; the last one may be read to its end
  const void* const* values = nullptr;          // and groups [kGroupRows][v], rows value_stride elements apart
  const float* const* key_factors = nullptr;    // groups [kGroupRows], of the keys' elements; null: ones
  const float* const* value_factors = nullptr;  // the same of the values
  Coming while_scoring, while_adding;
  int64_t n = 0;
  int64_t d = 0;
  int64_t v = 0;
  int64_t value_stride = 0;
  float scale = 1.0f;
  float* scores = nullptr;  // scratch [kMostTileQueries][kRunKeys]
  float* maxima = nullptr;  // [queries] running maxima, start at -infinity
  float* sums = nullptr;    // [queries] running sums of exponentials
  float* outs = nullptr;    // [queries][v] running weighted sums of values

  // The keys of the run that a query sees.
  Keys seen(int64_t query) const {
    const int64_t end = position + query / heads + 1;
    return {window > 0 && end > window ? end - window : 0, end < n ? end : n};
  }
};

struct ActivationBackwardRow {
  const void* grad_inner_F = nullptr;  // unweighted
  const void* slopes_U = nullptr;      // of inner by the sums before the activation, [gate; up] when gated
  const void* inner_F = nullptr;
  void* grad_pre_U = nullptr;
  DType dtype = DType::kF32;  // of all four
  int64_t F = 0;
  float weight = 1.0f;  // grad_pre is of weight * inner
  bool gated = false;
};

struct SoftmaxSum {
  float sum = 0.0f;      // of exponentials relative to the maximum
  float maximum = 0.0f;  // of the row
};

// One query's weights from its scores, and the gradient of the scores from that of the weights. With delta, the sum of
// weights * grad_weights:
struct AttentionBackwardRow {
  float* scores = nullptr;  // before scaling; overwritten
  const float* grad_weights = nullptr;
  void* weights = nullptr;      // receives exp(scale * scores - logsumexp)
  void* grad_scores = nullptr;  // receives weights * (grad_weights - delta) * scale
  DType dtype = DType::kF32;    // of these two
  int64_t n = 0;
  float scale = 1.0f;
  float logsumexp = 0.0f;
};

// What a step of Adam or AdamW is for every element (Loshchilov and Hutter 2019, algorithm 2), with
//   g = grad_scale * grad + l2 master,
//   exp_avg = beta1 exp_avg + (1 - beta1) g,  exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2,
//   master = decay master - step_size exp_avg / (inverse_root sqrt(exp_avg_sq) + eps)
struct AdamWFactors {
  float grad_scale = 1.0f;
  float beta1 = 0.0f, beta2 = 0.0f;
  float l2 = 0.0f;            // Adam's weight decay
  float decay = 1.0f;         // AdamW's: 1 - learning rate * weight decay
  float step_size = 0.0f;     // learning rate / (1 - beta1^t)
  float inverse_root = 1.0f;  // 1 / sqrt(1 - beta2^t)
  float eps = 0.0f;
};
struct AdamWRow {
  AdamWFactors factors;
  const void* grad = nullptr;  // null: zeros
  DType grad_dtype = DType::kF32;
  float* master = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  void* parameter = nullptr;  // receives the master in bf16; null: not wanted
  int64_t n = 0;
};

// Memory that a multiplication asks for meanwhile: a row of a panel of B from here, and `step` units on for every unit
// of K.
struct Ahead {
  const uint32_t* start = nullptr;
  int64_t step = 0;
};

// The first panel of A finds B in memory, which is far: it asks for what it needs itself a little later. (Hardware
// prefetchers stop at every page, and start late.) The more rows it has, the less far the processor runs ahead of what
// it waits for, and the earlier B is asked for; as measured. In units of K; a row of the panel, for one of them, takes
// `row` units of memory.
constexpr int64_t units_ahead(int rows, bool compact = false) {
  if (compact) return rows < 8 ? 96 : 128;
  return rows == 1 ? 32 : rows <= 8 ? 64 : 96;
}
// The same of quantized panels, in bytes, for so many lines of codes of A beside codes of so many bits; as measured.
constexpr int64_t bytes_ahead(int bits, int lines) { return std::min((bits < 8 ? 5120 : 3072) + 1024 * lines, 12288); }
inline Ahead ahead_in_panel(const uint32_t* b, int64_t row, int64_t units) { return {b + units * row, row}; }

// Where a row of weights goes, as in QuantizedView: scales, or the others.
struct QuantizedRow {
  uint32_t* codes = nullptr;
  BFloat16* scales = nullptr;
  uint8_t* scale_codes = nullptr;
  int8_t* minimum_codes = nullptr;
  float* factor = nullptr;
  float* workspace = nullptr;  // [2 * groups]
};

// A part of C that receives a tile of sums as they are or with bias. All columns are there.
struct PlainRows {
  void* start = nullptr;
  int64_t stride_bytes = 0;
  DType dtype = DType::kF32;
  const float* bias = nullptr;  // of the first column, or null
  bool stream = false;          // past the caches
};

struct KernelTable {
  std::string_view name;
  int width;                    // floats in a vector
  int panel_rows[kPanelTypes];  // most rows of a panel of A
  int few_rows[2];              // most rows of A that multiply_few takes: fp32, bf16
  int64_t slice_units[2];       // whole chunks of K at once, for which a panel of A stays in the L1 cache: fp32, bf16
  int panel_columns() const { return 2 * width; }

  // Panels of A of bf16 products hold fp32: the ISA multiplies bf16 as that.
  bool widens_bf16;
  PanelType type_of_a(PanelType type) const { return widens_bf16 && type == PanelType::kBF16 ? PanelType::kF32 : type; }
  // Units of a row of a panel of A: of all K, and beside so many of a panel of B.
  int64_t a_row_units(PanelType type, int64_t K) const { return coterie::a_row_units(type_of_a(type), K); }
  int64_t a_units(PanelType type, int64_t units) const { return type_of_a(type) == type ? units : 2 * units; }

  // Panels [first, last) of A for products with B of `type`, one behind the other: rounded to it, held as type_of_a.
  // K must be contiguous for quantized types.
  void (*pack_a)(const PackSource& source, PanelType type, const RowPanels& panels, int64_t first, int64_t last,
                 uint32_t* memory);
  // Panels [first, last) of B, fp32 or bf16. N counts the columns of C; B has 2N rows when gated.
  void (*pack_b)(const PackSource& source, PanelType type, int64_t N, bool gated, int64_t first, int64_t last,
                 uint32_t* memory);
  // Whether products of compact panels are seldom slower. (With AVX2 earlier ones cost a seventh from 4 rows on; these
  // and AMX's nobody has measured.)
  bool compact_pays;
  // A panel of B in bf16 made compact; false where it has too many patches.
  bool (*compact_panel)(const CompactPanel& shape, const uint32_t* panel, uint32_t* compact);
  // A row of weights to a quantized type, see quantized.h.
  void (*quantize_weights_row)(const void* row, DType dtype, int64_t K, PanelType type, const QuantizedRow& out);
  // Panels [first, last) of a quantized B.
  void (*pack_quantized_b)(const QuantizedView& b, int64_t N, bool gated, int64_t first, int64_t last,
                           uint32_t* memory);
  // tile[rows][2 * width] = A panel * B panel, over all of K; [type - kFirstQuantized][rows - 1]. Where that pays, asks
  // for what lies `ahead` bytes behind what it reads of B.
  void (*multiply_quantized[kPanelTypes - kFirstQuantized][kMaxPanelRows])(int64_t K, const uint32_t* a,
                                                                           const uint32_t* b, int64_t ahead,
                                                                           float* tile);
  // tile[rows][2 * width] = A panel * B panel, or += it with `add`; [type][rows - 1]. A tile has room for
  // kMaxPanelRows rows.
  void (*multiply[2][kMaxPanelRows])(int64_t units, const uint32_t* a, const uint32_t* b, Ahead ahead, float* tile,
                                     bool add);
  // The same, with all of K, straight into C. Null where sums don't end in registers.
  void (*multiply_into_rows[2][kMaxPanelRows])(int64_t units, const uint32_t* a, const uint32_t* b, Ahead ahead,
                                               const PlainRows& out);
  // tile[rows][2 * width] = A panel * compact panel of B, over all of K; [rows - 1]. The same bits as with the plain
  // one.
  void (*multiply_compact[kMaxPanelRows])(const CompactPanel& shape, const uint32_t* a, const uint32_t* compact,
                                          Ahead ahead, float* tile);
  // B in place (see multiply_in_place.inl), with K contiguous: tile[rows][2 * width] = A panel of at most few_rows rows
  // * the panel; [rows - 1].
  void (*multiply_few[2][kMostFewRows])(const PanelInPlace& b, int64_t units, const uint32_t* a, float* tile);
  // The same with more rows: A lies in strips of `width` rows, [units][width], zero up to a whole chunk and a whole
  // strip. Packs strips [first, last) of the M rows.
  void (*pack_strips)(const PackSource& source, PanelType type, int64_t M, int64_t first, int64_t last,
                      uint32_t* memory);
  // tile[rows][2 * width] = one or two strips with `rows` rows, at most 2 * width, times the panel. [1] is null where
  // bf16 is widened: to widen B anew for every two strips would cost more than packing it.
  void (*multiply_along_k[2])(const PanelInPlace& b, int64_t units, const uint32_t* strips, int64_t rows, float* tile);
  // B in place with columns contiguous, all of them there: adds a part of K, whole chunks but for the end, to the sums
  // of `tile`, and asks for the next part. Unless `packed` is null, the part of the panel of B is left there.
  void (*multiply_along_n[2][kMaxPanelRows])(const PanelInPlace& b, int64_t units, const uint32_t* a, uint32_t* packed,
                                             float* tile);
  // A thread's multiplications stand between these two; they set up and let go what the CPU needs for them.
  void (*begin_products)();
  void (*end_products)();
  void (*store_tile)(const TileStore& store);
  // For benches: `steps` rounds of peak_flops() operations on registers alone, the limit of multiply.
  float (*register_peak[2])(int64_t steps);
  int64_t register_peak_flops[2];
  int64_t peak_flops(DType type) const { return register_peak_flops[type == DType::kBF16]; }

  void (*rms_norm_row)(const float* x, const float* weight, float eps, int64_t D, float* out);
  // grad_weight_sum += the row's part of the weight's gradient.
  void (*rms_norm_backward_row)(const float* x, const float* weight, const float* grad, float eps, int64_t D,
                                float* grad_x, float* grad_weight_sum);
  void (*layer_norm_row)(const float* x, const float* weight, const float* bias, float eps, int64_t D, float* out);
  void (*layer_norm_backward_row)(const float* x, const float* weight, const float* grad, float eps, int64_t D,
                                  float* grad_x, float* grad_weight_sum, float* grad_bias_sum);
  void (*softmax_row)(const float* x, int64_t n, float* out);
  void (*rope_head)(float* x, const float* cosine, const float* sine, int64_t half);
  void (*attend)(const AttendStep& step);
  // out = exp(scale * (x - the maximum of x)), scale > 0.
  SoftmaxSum (*exponentials_row)(const float* x, int64_t n, float scale, void* out, DType dtype);
  void (*attention_backward_row)(const AttentionBackwardRow& row);

  float (*square_sum_row)(const void* x, DType dtype, int64_t n);
  void (*adamw_row)(const AdamWRow& row);
  // Each value becomes one of its two neighbours in bf16, the nearer one more often: the mean over many keys is the
  // value. Sums of small steps keep what rounding to the nearest would lose. The choice is a function of (key, index).
  void (*round_randomly_row)(const float* in, uint32_t key, BFloat16* out, int64_t n);

  // Rows of kF32 or kBF16.
  void (*convert_row)(const void* in, DType in_dtype, void* out, DType out_dtype, int64_t n);
  // out = in / factor, rounded to the nearest integer; returns the factor, the largest |in| / 127 (0 for zeros).
  float (*quantize_row)(const float* in, int64_t n, int8_t* out);
  // The same with codes of 16 bits, up to `largest`, at most 32767.
  float (*quantize_row_wide)(const float* in, int64_t n, int32_t largest, int16_t* out);
  void (*widen_row)(const int8_t* in, int64_t n, int16_t* out);  // out = in
  void (*scale_row)(const void* in, DType in_dtype, float scale, void* out, DType out_dtype, int64_t n);
  void (*add_row)(const void* in, DType dtype, float* sum, int64_t n);  // sum += in
  float (*dot_row)(const void* a, DType a_dtype, const float* b, int64_t n);
  // out = sum over i of weights[i] * rows[i], in the order of i, rounded once.
  void (*combine_rows)(const float* const* rows, const float* weights, int64_t count, void* out, DType dtype,
                       int64_t n);
  // Returns the dot product of grad_inner and inner.
  float (*activate_backward_row)(const ActivationBackwardRow& row);
};

// The table in use; any thread. InvalidArgument when COTERIE_ISA names an ISA that does not exist or
// that this CPU does not run.
const KernelTable& active_kernels();

// The tables that this CPU runs, best first.
std::span<const KernelTable* const> supported_kernels();

// Makes another table the active one while it lives. For tests and benches; nothing else may run.
class ScopedKernels {
 public:
  explicit ScopedKernels(const KernelTable& table);
  ~ScopedKernels();
  ScopedKernels(const ScopedKernels&) = delete;
  ScopedKernels& operator=(const ScopedKernels&) = delete;

 private:
  const KernelTable* previous_;
};

extern const KernelTable kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kAmxKernels;

bool may_use_tiles();  // asks the operating system for AMX

}  // namespace coterie
