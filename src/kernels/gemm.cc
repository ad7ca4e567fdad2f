// How a group of products is cut up.
//
// A tile of C is one panel of A (up to panel_rows rows) times one panel of B (2 vectors of columns). A task
// is a block of panels of A, small enough for half of an L2 cache, times a block of panels of B: a panel of
// B is read once per block, lies in the L1 or L2 cache meanwhile, and A comes from L2.
//
// An operand that is not in panels yet is packed where it costs least: by the task that uses it, straight
// into the cache, when no other task needs the same part; else beforehand, once for all tasks. With few rows of
// A, B is not packed at all but read where it lies (multiply_in_place.inl), by tasks that take all rows of A.
#include "kernels/gemm.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/workspace.h"

namespace coterie {
namespace {

// Panels of A that a task multiplies with one panel of B after the other: most of the L2 caches of today's
// servers (1 to 2 MiB).
constexpr int64_t kBlockABytes = 1 << 20;
// Panels of B that a task packs at once, so that a row of a transposed source is read in long pieces.
constexpr int64_t kGroupBBytes = 512 << 10, kMostGroupB = 8;
// With at most so many rows of A, B is read where it lies: along K, along N. (With twice as many, packing it costs
// about as much.)
constexpr int64_t kMostRowsAlongK = 64, kMostRowsAlongN[2] = {8, 16};  // fp32, bf16
// Pieces of 64 bytes, which bf16 is read in along N, are read well from caches alone: of B of a whole group up to this.
constexpr int64_t kCachedBBytes = 16 << 20;
// B of a problem with few panels of A, or with few enough for a cache (in fp32 a further one: arithmetic is slow enough
// to read A from there), is packed by the tasks. With more, C is cut by rows too.
constexpr int64_t kSharedABytes[2] = {2 << 20, kBlockABytes};  // fp32, bf16
constexpr int64_t kFewPanelsA = 6;
constexpr int64_t kMostPacksOfA = 2;
// A task that packs its own A should have this many panels of it, to read B seldom.
constexpr int64_t kLeastOwnPanelsA = 4;
// A task should outweigh handing it out (about 0.1 us) by far, and there should be several for every
// thread, since threads are disturbed. In multiply-adds; 1e6 take about 10 us.
constexpr double kLeastTaskCost = 0.4e6, kMostTaskCost = 64e6;
constexpr double kTasksPerThread = 8;
// Reading a fresh 32-bit unit of B takes about as long as this many multiply-adds.
constexpr double kUnitCost = 8;
// A group's results above this size are written past the caches: nobody finds them there later, and a line
// that is not owned yet would be read before it is written.
constexpr int64_t kStreamBytes = 8 << 20;
// Packing less than this many units is not worth waking the other threads for.
constexpr int64_t kInlinePackUnits = 32 << 10;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

PackSource pack_source(const ConstMatrix& m, int64_t rows, int64_t cols, const int32_t* gather_rows,
                       const int32_t* gather_cols) {
  return {m.data, m.dtype, rows, cols, m.row_stride, m.col_stride, gather_rows, gather_cols};
}

// The panels of B. Panel p holds columns [p * width(), ...) of C.
struct PanelsB {
  const KernelTable* kernels;
  PackSource source;
  DType type;
  bool gated;
  int64_t N;  // columns of C

  int64_t width() const { return gated ? kernels->width : kernels->panel_columns(); }
  int64_t count() const { return ceil_div(N, width()); }
  int64_t panel_units() const { return padded_row_units(units_of(type, source.cols)) * kernels->panel_columns(); }

  int64_t group() const {
    return std::clamp<int64_t>(kGroupBBytes / std::max<int64_t>(4 * panel_units(), 1), 1, kMostGroupB);
  }
  void pack(int64_t first, int64_t last, uint32_t* memory) const {
    for (int64_t p = first; p < last; p += group()) {
      const int64_t end = std::min(p + group(), last);
      kernels->pack_b(source, type, N, gated, p, end, memory + (p - first) * panel_units());
    }
  }
};

// How B is read where it lies: not at all, with K contiguous (then A is in strips), or with columns contiguous.
enum class InPlace { kNo, kAlongK, kAlongN };

// A problem with its cut.
struct Plan {
  const GemmProblem* problem;
  PanelsB b;
  PackSource a;
  RowPanels rows;
  int64_t units;             // of K
  int64_t Q;                 // panels of B
  int64_t block_P, block_Q;  // panels of a task
  int64_t first_task, num_tasks;
  bool stream;                   // C past the caches
  bool own_a, own_b;             // tasks pack the operand themselves
  InPlace in_place;              // few rows of A: they are packed beforehand, and B is read where it lies
  uint32_t* a_panels = nullptr;  // all of A, unless own_a
  const uint32_t* b_panels = nullptr;

  int64_t P() const { return rows.P; }
  int64_t a_units(int64_t first, int64_t last) const {
    return (rows.first_row(last) - rows.first_row(first)) * padded_row_units(units);
  }
  bool in_strips() const { return in_place == InPlace::kAlongK; }
  int64_t strips() const { return ceil_div(rows.M, b.kernels->width); }
  int64_t strip_units() const { return b.kernels->width * padded_row_units(units); }
  int64_t all_a_units() const { return in_strips() ? strips() * strip_units() : rows.M * padded_row_units(units); }
  bool packs_b_before() const { return !problem->packed_b && !own_b && in_place == InPlace::kNo; }
  double cost(int64_t panels_a, int64_t panels_b) const {
    const double m = static_cast<double>(panels_a) * static_cast<double>(rows.M) / static_cast<double>(P());
    return static_cast<double>(panels_b * b.panel_units()) * (m + kUnitCost) + m;
  }
};

void check_problem(const GemmProblem& p) {
  COTERIE_CHECK(p.packed_b == nullptr || p.b.data == nullptr, "both b and packed_b are given");
  const bool transformed = p.gated || p.activation != Activation::kNone;
  COTERIE_CHECK(!(p.accumulate && transformed), "accumulate with an activation");
  COTERIE_CHECK(!p.pre.data || p.pre.dtype == p.c.dtype, "the sums before the activation have another type than C");
  const int64_t b_rows = p.packed_b ? p.packed_b->rows() : p.b.rows;
  const int64_t b_cols = p.packed_b ? p.packed_b->cols() : (p.b_gather_K ? p.a.cols : p.b.cols);
  COTERIE_CHECK(p.a.cols == 0 || b_cols == p.a.cols, "K of A and B differ");
  COTERIE_CHECK(b_rows == (p.gated ? 2 : 1) * p.c.cols, "N of B and C differ");
  COTERIE_CHECK((p.gather_M ? p.num_gathered : p.a.rows) == p.c.rows, "M of A and C differ");
  COTERIE_CHECK(!p.packed_b || p.packed_b->gated() == p.gated, "B was packed for another kind of problem");
  COTERIE_CHECK(!p.packed_b || b_rows == 0 || p.packed_b->kernels() == &active_kernels(),
                "B was packed for another ISA");
}

// Where rows of A are so few that packing B would not pay, and it lies such that it can be read as it is.
InPlace in_place(const GemmProblem& p, DType type, int64_t group_b_bytes) {
  const bool bf16 = type == DType::kBF16;
  if (!p.b.data || p.b.dtype != type || p.b_gather_K) return InPlace::kNo;
  if (p.b.col_stride == 1) return p.c.rows <= kMostRowsAlongK ? InPlace::kAlongK : InPlace::kNo;
  const bool along_n = p.b.row_stride == 1 && p.c.rows <= kMostRowsAlongN[bf16];
  return along_n && (!bf16 || group_b_bytes <= kCachedBBytes) ? InPlace::kAlongN : InPlace::kNo;
}

Plan make_plan(const GemmProblem& p, const KernelTable& kernels, int64_t group_b_bytes) {
  check_problem(p);
  Plan plan = {};
  plan.problem = &p;
  const int64_t K = p.a.cols, N = p.c.cols;
  const DType type = p.packed_b ? p.packed_b->dtype() : p.panels.value_or(p.b.dtype);
  const int64_t most_rows = kernels.panel_rows[type == DType::kBF16];
  plan.rows = {p.c.rows, ceil_div(p.c.rows, most_rows)};
  plan.a = pack_source(p.a, p.c.rows, K, p.gather_M, nullptr);
  plan.b = {&kernels, pack_source(p.b, p.gated ? 2 * N : N, K, nullptr, p.b_gather_K), type, p.gated, N};
  plan.units = units_of(type, K);
  plan.Q = plan.b.count();
  plan.in_place = in_place(p, type, group_b_bytes);
  return plan;
}

// Whether the tasks pack B: where A has few panels, or few enough for a cache. But with a small B the work is writing
// C, and where that stays in the caches, tasks should have whole rows of it: columns of a matrix compete for a part of
// the places in a cache.
bool should_own_b(const Plan& plan) {
  if (plan.problem->packed_b || plan.in_place != InPlace::kNo) return false;
  const bool by_rows = !plan.stream && plan.Q * plan.b.panel_units() <= kInlinePackUnits;
  const int64_t most_bytes = kSharedABytes[plan.b.type == DType::kBF16];
  return plan.P() <= kFewPanelsA || (4 * plan.all_a_units() <= most_bytes && !by_rows);
}

// Chooses blocks so that a task costs about `most`, and numbers the tasks.
void cut_plan(Plan& plan, double most, int64_t first_task) {
  const int64_t P = plan.P(), Q = plan.Q;
  plan.own_b = should_own_b(plan);
  const int64_t panel_bytes = 4 * ceil_div(plan.all_a_units(), P);
  const int64_t fitting_P = std::max<int64_t>(1, kBlockABytes / std::max<int64_t>(panel_bytes, 1));
  plan.block_P = std::min(P, fitting_P);
  plan.block_Q = Q;
  const bool all_rows = plan.own_b || plan.in_place != InPlace::kNo;
  if (all_rows) {
    plan.block_P = P;
  } else {
    // Whole rows of C when they make tasks of a sensible size; then nobody else needs their part of A.
    const auto affordable = static_cast<int64_t>(most / plan.cost(1, Q));
    const int64_t own = std::min(plan.block_P, std::max(affordable, kLeastOwnPanelsA));
    plan.own_a = P > kFewPanelsA && plan.cost(own, Q) <= 2 * most;
    if (plan.own_a) plan.block_P = ceil_div(P, ceil_div(P, own));
  }
  if (!plan.own_a) {
    while (plan.block_P > 1 && !all_rows && plan.cost(plan.block_P, 1) > most) plan.block_P = ceil_div(plan.block_P, 2);
    plan.block_Q = std::clamp<int64_t>(static_cast<int64_t>(most / plan.cost(plan.block_P, 1)), 1, Q);
    if (plan.own_b && plan.block_Q > plan.b.group()) plan.block_Q -= plan.block_Q % plan.b.group();
    // To pack A anew costs no more than to write it to memory and read it from there.
    plan.own_a = plan.own_b && 4 * plan.all_a_units() <= kBlockABytes && ceil_div(Q, plan.block_Q) <= kMostPacksOfA;
  }
  plan.first_task = first_task;
  plan.num_tasks = ceil_div(P, plan.block_P) * ceil_div(Q, plan.block_Q);
}

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
  if (p.pre.data) {
    const Matrix pre = p.pre.row_range(row, rows);
    store.pre = static_cast<char*>(pre.data) + column * static_cast<int64_t>(dtype_size(pre.dtype));
    store.pre_stride = pre.row_stride;
    store.pre_up_offset = p.c.cols;
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

// One panel of A with panels [first_b, last_b) of B. Where K is long, a slice of it at a time, so that the panel of A
// stays in the L1 cache; sums wait in fp32, which changes no bit of them.
void compute_tiles(const Plan& plan, int64_t pa, int64_t first_b, int64_t last_b, const uint32_t* a_panel,
                   const uint32_t* b_panels) {
  constexpr int64_t kTile = kMaxPanelRows * kMaxPanelColumns;
  alignas(64) float tiles[kMostGroupB * kTile];
  const KernelTable& kernels = *plan.b.kernels;
  const bool bf16 = plan.b.type == DType::kBF16;
  const int rows = plan.rows.rows(pa);
  int64_t done = 0;
  do {
    const int64_t units = std::min(plan.units - done, kernels.slice_units[bf16]);
    const bool last = done + units == plan.units;
    const uint32_t* b = b_panels + done * kernels.panel_columns();
    for (int64_t pb = first_b; pb < last_b; ++pb, b += plan.b.panel_units()) {
      float* const tile = tiles + (last && done == 0 ? 0 : (pb - first_b) * kTile);
      kernels.multiply[bf16][rows - 1](units, a_panel + done * rows, b, tile, done > 0);
      if (last) store_tile(plan, plan.rows.first_row(pa), rows, pb, tile);
    }
    done += units;
  } while (done < plan.units);
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
  panel.stride_bytes = (plan.in_strips() ? b.row_stride : b.col_stride) * size;
  panel.cols = b.cols;
  panel.columns_ahead = last ? 0 : plan.b.width();
  return panel;
}

void multiply_along_k(const Plan& plan, int64_t first_b, int64_t last_b) {
  alignas(64) float tile[kMaxPanelRows * kMaxPanelColumns];
  const KernelTable& kernels = *plan.b.kernels;
  for (int64_t pb = first_b; pb < last_b; ++pb) {
    PanelInPlace b = panel_in_place(plan, pb, pb + 1 == last_b);
    for (int64_t strip = 0; strip < plan.strips(); strip += 2) {
      const int64_t row = strip * kernels.width, rows = std::min(plan.rows.M - row, int64_t{kernels.panel_columns()});
      const uint32_t* const strips = plan.a_panels + strip * plan.strip_units();
      kernels.multiply_along_k[plan.b.type == DType::kBF16](b, plan.units, strips, rows, tile);
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
  const bool bf16 = plan.b.type == DType::kBF16;
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
      multiply(b, units, plan.a_panels + u * rows, packed ? packed + part : nullptr, tiles + (pb - first_b) * kTile);
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
      const uint32_t* const a = plan.a_panels + plan.a_units(0, pa);
      compute_tiles(plan, pa, first, end_b, a, own_b + (first - group_b) * panel_units);
    }
  }
}

// own_a and own_b are the thread's memory for panels.
void multiply_panels(const Plan& plan, int64_t first_a, int64_t last_a, int64_t first_b, int64_t last_b,
                     uint32_t* own_a, uint32_t* own_b) {
  const uint32_t* a_panels = own_a;
  if (plan.own_a) {
    plan.b.kernels->pack_a(plan.a, plan.b.type, plan.rows, first_a, last_a, own_a);
  } else {
    a_panels = plan.a_panels + plan.a_units(0, first_a);
  }
  const int64_t group = plan.b.group(), panel_units = plan.b.panel_units();
  for (int64_t group_b = first_b; group_b < last_b; group_b += group) {
    const int64_t end_b = std::min(group_b + group, last_b);
    const uint32_t* b_panels = own_b;
    if (plan.own_b) {
      plan.b.pack(group_b, end_b, own_b);
    } else {
      b_panels = plan.b_panels + group_b * panel_units;
    }
    for (int64_t pa = first_a; pa < last_a; ++pa) {
      compute_tiles(plan, pa, group_b, end_b, a_panels + plan.a_units(first_a, pa), b_panels);
    }
  }
}

void run_task(const Plan& plan, int64_t task, uint32_t* own_a, uint32_t* own_b) {
  const int64_t blocks_P = ceil_div(plan.P(), plan.block_P);
  const int64_t first_a = task % blocks_P * plan.block_P, last_a = std::min(first_a + plan.block_P, plan.P());
  const int64_t first_b = task / blocks_P * plan.block_Q, last_b = std::min(first_b + plan.block_Q, plan.Q);
  plan.b.kernels->begin_products();
  switch (plan.in_place) {
    case InPlace::kNo:
      multiply_panels(plan, first_a, last_a, first_b, last_b, own_a, own_b);
      break;
    case InPlace::kAlongK:
      multiply_along_k(plan, first_b, last_b);
      break;
    case InPlace::kAlongN:
      multiply_along_n(plan, first_b, last_b, own_b);
      break;
  }
  plan.b.kernels->end_products();
  if (plan.stream) std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores keep no order else
}

// All state of one call; kept by the calling thread so that its memory is reused.
class GroupedGemm {
 public:
  void run(std::span<const GemmProblem> problems, ThreadPool& pool) {
    make_plans(problems, pool.num_threads());
    take_workspace(pool.num_threads());
    pack(pool);
    const int64_t num_tasks = plans_.empty() ? 0 : plans_.back().first_task + plans_.back().num_tasks;
    pool.run(num_tasks, [this](int64_t task, int thread) {
      const auto after = std::upper_bound(plans_.begin(), plans_.end(), task,
                                          [](int64_t t, const Plan& plan) { return t < plan.first_task; });
      const Plan& plan = *(after - 1);
      uint32_t* const own = own_memory_ + thread * (own_a_units_ + own_b_units_);
      run_task(plan, task - plan.first_task, own, own + own_a_units_);
    });
  }

 private:
  void make_plans(std::span<const GemmProblem> problems, int num_threads) {
    const KernelTable& kernels = active_kernels();
    plans_.clear();
    double total = 0;
    int64_t b_bytes = 0, c_bytes = 0;
    for (const GemmProblem& p : problems) b_bytes += p.b.rows * p.b.cols * static_cast<int64_t>(dtype_size(p.b.dtype));
    for (const GemmProblem& problem : problems) {
      const Plan plan = make_plan(problem, kernels, b_bytes);
      // A problem without rows or columns has no task; leaving it out keeps first_task increasing.
      if (plan.P() == 0 || plan.Q == 0) continue;
      plans_.push_back(plan);
      total += plan.cost(plan.P(), plan.Q);
      c_bytes += problem.c.rows * problem.c.cols * static_cast<int64_t>(dtype_size(problem.c.dtype));
    }
    const double most = std::clamp(total / (num_threads * kTasksPerThread), kLeastTaskCost, kMostTaskCost);
    int64_t first_task = 0;
    for (Plan& plan : plans_) {
      plan.stream = c_bytes > kStreamBytes && !plan.problem->accumulate;
      cut_plan(plan, most, first_task);
      first_task += plan.num_tasks;
    }
  }

  void take_workspace(int num_threads) {
    own_a_units_ = own_b_units_ = 0;
    size_t bytes = 0;
    for (const Plan& plan : plans_) {
      const int64_t panel_a_units = kMaxPanelRows * padded_row_units(plan.units);
      if (plan.own_a) own_a_units_ = std::max(own_a_units_, plan.block_P * panel_a_units);
      if (plan.in_place == InPlace::kAlongN) own_b_units_ = std::max(own_b_units_, kMostGroupB * plan.b.panel_units());
      if (plan.own_b) own_b_units_ = std::max(own_b_units_, plan.b.group() * plan.b.panel_units());
      if (!plan.own_a) bytes += unit_bytes(plan.all_a_units());
      if (plan.packs_b_before()) bytes += unit_bytes(plan.Q * plan.b.panel_units());
    }
    own_b_units_ = padded_row_units(own_b_units_);  // keeps the threads' parts on cache lines of their own
    const int64_t own_units = (own_a_units_ + own_b_units_) * num_threads;
    workspace_.reserve(bytes + unit_bytes(own_units) + unit_bytes(kBehindPanelsA));
    own_memory_ = take(own_units);
    for (Plan& plan : plans_) {
      if (!plan.own_a) plan.a_panels = take(plan.all_a_units());
      if (plan.problem->packed_b) plan.b_panels = static_cast<const uint32_t*>(plan.problem->packed_b->data());
      if (plan.packs_b_before()) plan.b_panels = take(plan.Q * plan.b.panel_units());
    }
  }
  static size_t unit_bytes(int64_t units) { return Workspace::padded(static_cast<size_t>(units) * sizeof(uint32_t)); }
  uint32_t* take(int64_t units) { return workspace_.take<uint32_t>(static_cast<size_t>(units)); }

  void pack(ThreadPool& pool) {
    pack_tasks_.clear();
    int64_t total = 0;
    for (const Plan& plan : plans_) {
      if (!plan.own_a) {
        total += plan.all_a_units();
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
  int64_t own_a_units_ = 0, own_b_units_ = 0;  // of one thread
  uint32_t* own_memory_ = nullptr;
};

}  // namespace

PackedMatrix::PackedMatrix(const ConstMatrix& b, ThreadPool& pool, bool gated)
    : kernels_(&active_kernels()), gated_(gated), dtype_(b.dtype), rows_(b.rows), cols_(b.cols) {
  COTERIE_CHECK(!gated || b.rows % 2 == 0, "a gated B has an even number of rows");
  const PanelsB panels = {kernels_, pack_source(b, b.rows, b.cols, nullptr, nullptr), dtype_, gated,
                          gated ? b.rows / 2 : b.rows};
  const int64_t panel_units = panels.panel_units();
  panels_ = AlignedBuffer(static_cast<size_t>(panels.count() * panel_units) * 4);
  const int64_t group = panels.group();
  pool.run(ceil_div(panels.count(), group), [&](int64_t task, int) {
    const int64_t first = task * group, last = std::min(first + group, panels.count());
    panels.pack(first, last, panels_.as<uint32_t>() + first * panel_units);
  });
}

void grouped_gemm(std::span<const GemmProblem> problems, ThreadPool& pool) {
  static thread_local GroupedGemm state;
  state.run(problems, pool);
}

}  // namespace coterie
