// How a group of products is cut up. First the operands that are not in panels yet are packed, then
// the tiles of C are computed; both by tasks of about equal cost over all problems of the group.
//
// A tile is one panel of A (up to panel_rows rows) times one panel of B (2 vectors of columns). A task
// is a block of panels of A, small enough for half of an L2 cache, times a block of panels of B: a
// panel of B is read once per block, lies in the L1 or L2 cache meanwhile, and A comes from L2.
#include "kernels/gemm.h"

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "kernels/kernel_table.h"
#include "kernels/workspace.h"

namespace coterie {
namespace {

// Half of the L2 cache of the smaller current cores (1 MiB), rounded down for B's panel and C.
constexpr int64_t kBlockABytes = 256 << 10;
// B of a problem with few rows is packed by the task that uses it, panel by panel, and never leaves
// the cache. Beyond this many panels of A, C is cut by rows too and B is packed once for all.
constexpr int64_t kOwnPackPanels = 6;
// A task should outweigh handing it out (about 0.1 us) by far, and there should be several for every
// thread, since threads are disturbed. In multiply-adds; 1e6 take about 10 us.
constexpr double kLeastTaskCost = 0.4e6, kMostTaskCost = 16e6;
constexpr double kTasksPerThread = 8;
// Reading a fresh 32-bit unit of B takes about as long as this many multiply-adds.
constexpr double kUnitCost = 8;
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
  int64_t panel_units() const { return units_of(type, source.cols) * kernels->panel_columns(); }

  void pack(int64_t p, uint32_t* panel) const {
    const int64_t W = kernels->width, first = p * width(), second = gated ? N + first : first + W;
    const int64_t left = N - first;
    kernels->pack_b(source, type, first, std::min(left, W), panel);
    kernels->pack_b(source, type, second, gated ? std::min(left, W) : std::clamp<int64_t>(left - W, 0, W), panel + W);
  }
};

// A problem with its cut: P panels of A and Q of B, in blocks.
struct Plan {
  const GemmProblem* problem;
  PanelsB b;
  PackSource a;
  int64_t M, units;
  int64_t P, Q;
  int64_t block_P, block_Q;      // panels of a task
  int64_t first_task, num_tasks;
  bool own_pack;                 // tasks pack B's panels themselves
  uint32_t* a_panels;            // workspace
  const uint32_t* b_panels;      // workspace or packed_b; null when own_pack

  // Rows are spread evenly over the panels: 13 rows are 7 + 6 rather than 12 + 1.
  int64_t first_row(int64_t p) const { return p * (M / P) + std::min(p, M % P); }
  int rows(int64_t p) const { return static_cast<int>(M / P + (p < M % P)); }
  // Panels of a problem lie one after the other, each row padded to whole chunks.
  int64_t row_units() const { return ceil_div(units, kChunkUnits) * kChunkUnits; }
  uint32_t* a_panel(int64_t p) const { return a_panels + first_row(p) * row_units(); }
  int64_t a_units() const { return M * row_units(); }
  double cost(int64_t panels_a, int64_t panels_b) const {
    const double rows = static_cast<double>(panels_a) * static_cast<double>(M) / static_cast<double>(P);
    return static_cast<double>(panels_b * b.panel_units()) * (rows + kUnitCost) + rows;
  }
};

void check_problem(const GemmProblem& p) {
  COTERIE_CHECK(p.packed_b == nullptr || p.b.data == nullptr, "both b and packed_b are given");
  const bool transformed = p.gated || p.activation != Activation::kNone;
  COTERIE_CHECK(!(p.accumulate && transformed), "accumulate with an activation");
  const int64_t b_rows = p.packed_b ? p.packed_b->rows() : p.b.rows;
  const int64_t b_cols = p.packed_b ? p.packed_b->cols() : (p.b_gather_K ? p.a.cols : p.b.cols);
  COTERIE_CHECK(p.a.cols == 0 || b_cols == p.a.cols, "K of A and B differ");
  COTERIE_CHECK(b_rows == (p.gated ? 2 : 1) * p.c.cols, "N of B and C differ");
  COTERIE_CHECK((p.gather_M ? p.num_gathered : p.a.rows) == p.c.rows, "M of A and C differ");
  COTERIE_CHECK(!p.packed_b || p.packed_b->gated() == p.gated, "B was packed for another kind of problem");
  COTERIE_CHECK(!p.packed_b || b_rows == 0 || p.packed_b->kernels() == &active_kernels(), "B was packed for another ISA");
}

Plan make_plan(const GemmProblem& p, const KernelTable& kernels) {
  check_problem(p);
  Plan plan = {};
  plan.problem = &p;
  plan.M = p.c.rows;
  const int64_t K = p.a.cols;
  const DType type = p.packed_b ? p.packed_b->dtype() : p.b.dtype;
  const int64_t rows_a = p.gather_M ? p.num_gathered : p.a.rows;
  plan.a = pack_source(p.a, rows_a, K, p.gather_M, nullptr);
  plan.b = {&kernels, pack_source(p.b, p.gated ? 2 * p.c.cols : p.c.cols, K, nullptr, p.b_gather_K), type, p.gated,
            p.c.cols};
  plan.units = units_of(type, K);
  plan.P = ceil_div(plan.M, kernels.panel_rows[type == DType::kBF16]);
  plan.Q = plan.b.count();
  plan.own_pack = !p.packed_b && plan.P <= kOwnPackPanels;
  const int64_t panel_bytes = kernels.panel_rows[type == DType::kBF16] * plan.row_units() * 4;
  plan.block_P = std::max<int64_t>(1, std::min(plan.P, kBlockABytes / std::max<int64_t>(panel_bytes, 1)));
  if (plan.own_pack) plan.block_P = std::max<int64_t>(plan.P, 1);
  return plan;
}

// Chooses block_Q so that a task costs at most `most`, and numbers the tasks.
void cut_plan(Plan& plan, double most, int64_t first_task) {
  plan.first_task = first_task;
  plan.num_tasks = 0;
  if (plan.P == 0 || plan.Q == 0) return;
  while (plan.block_P > 1 && !plan.own_pack && plan.cost(plan.block_P, 1) > most) plan.block_P = ceil_div(plan.block_P, 2);
  const int64_t fitting = static_cast<int64_t>(most / plan.cost(plan.block_P, 1));
  plan.block_Q = std::clamp<int64_t>(fitting, 1, plan.Q);
  plan.num_tasks = ceil_div(plan.P, plan.block_P) * ceil_div(plan.Q, plan.block_Q);
}

// Panels [first, last) of one operand of one problem.
struct PackTask {
  const Plan* plan;
  bool is_b;
  int64_t first, last;

  void run() const {
    for (int64_t p = first; p < last; ++p) {
      if (is_b) {
        plan->b.pack(p, const_cast<uint32_t*>(plan->b_panels) + p * plan->b.panel_units());
      } else {
        plan->b.kernels->pack_a(plan->a, plan->b.type, plan->first_row(p), plan->rows(p), plan->a_panel(p));
      }
    }
  }
};

void compute_tile(const Plan& plan, int64_t pa, int64_t pb, const uint32_t* b_panel) {
  alignas(64) float tile[kMaxPanelRows * kMaxPanelColumns];
  const GemmProblem& p = *plan.problem;
  const KernelTable& kernels = *plan.b.kernels;
  const int rows = plan.rows(pa);
  kernels.multiply[plan.b.type == DType::kBF16][rows - 1](plan.units, plan.a_panel(pa), b_panel, tile);

  const int64_t row = plan.first_row(pa), column = pb * plan.b.width();
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
    store.pre_dtype = pre.dtype;
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
  kernels.store_tile(store);
}

// `own_panel` is the thread's memory for one panel of B.
void run_task(const Plan& plan, int64_t task, uint32_t* own_panel) {
  const int64_t blocks_P = ceil_div(plan.P, plan.block_P);
  const int64_t first_a = task % blocks_P * plan.block_P, last_a = std::min(first_a + plan.block_P, plan.P);
  const int64_t first_b = task / blocks_P * plan.block_Q, last_b = std::min(first_b + plan.block_Q, plan.Q);
  for (int64_t pb = first_b; pb < last_b; ++pb) {
    const uint32_t* b_panel = own_panel;
    if (plan.own_pack) {
      plan.b.pack(pb, own_panel);
    } else {
      b_panel = plan.b_panels + pb * plan.b.panel_units();
    }
    for (int64_t pa = first_a; pa < last_a; ++pa) compute_tile(plan, pa, pb, b_panel);
  }
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
      run_task(plan, task - plan.first_task, own_panels_ + thread * own_panel_units_);
    });
  }

 private:
  void make_plans(std::span<const GemmProblem> problems, int num_threads) {
    const KernelTable& kernels = active_kernels();
    plans_.clear();
    double total = 0;
    for (const GemmProblem& problem : problems) {
      plans_.push_back(make_plan(problem, kernels));
      const Plan& plan = plans_.back();
      if (plan.P > 0) total += plan.cost(plan.P, plan.Q);
      // A problem without rows or columns has no task; leaving it out keeps first_task increasing.
      if (plan.P == 0 || plan.Q == 0) plans_.pop_back();
    }
    const double most = std::clamp(total / (num_threads * kTasksPerThread), kLeastTaskCost, kMostTaskCost);
    int64_t first_task = 0;
    for (Plan& plan : plans_) {
      cut_plan(plan, most, first_task);
      first_task += plan.num_tasks;
    }
  }

  void take_workspace(int num_threads) {
    own_panel_units_ = 0;
    size_t bytes = 0;
    for (const Plan& plan : plans_) {
      bytes += Workspace::padded(static_cast<size_t>(plan.a_units()) * 4);
      if (plan.own_pack) own_panel_units_ = std::max(own_panel_units_, plan.b.panel_units());
      if (packs_b(plan)) bytes += Workspace::padded(static_cast<size_t>(plan.Q * plan.b.panel_units()) * 4);
    }
    own_panel_units_ = ceil_div(own_panel_units_, 16) * 16;
    const auto own_units = static_cast<size_t>(own_panel_units_ * num_threads);
    workspace_.reserve(bytes + Workspace::padded(own_units * 4));
    own_panels_ = workspace_.take<uint32_t>(own_units);
    for (Plan& plan : plans_) {
      plan.a_panels = workspace_.take<uint32_t>(static_cast<size_t>(plan.a_units()));
      if (plan.problem->packed_b) plan.b_panels = static_cast<const uint32_t*>(plan.problem->packed_b->data());
      if (packs_b(plan)) plan.b_panels = workspace_.take<uint32_t>(static_cast<size_t>(plan.Q * plan.b.panel_units()));
    }
  }

  static bool packs_b(const Plan& plan) { return !plan.problem->packed_b && !plan.own_pack; }

  void pack(ThreadPool& pool) {
    pack_tasks_.clear();
    int64_t total = 0;
    for (const Plan& plan : plans_) {
      total += plan.a_units();
      add_pack_tasks(plan, false, plan.P, ceil_div(plan.a_units(), plan.P));
      if (!packs_b(plan)) continue;
      total += plan.Q * plan.b.panel_units();
      add_pack_tasks(plan, true, plan.Q, plan.b.panel_units());
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
  int64_t own_panel_units_ = 0;
  uint32_t* own_panels_ = nullptr;
};

}  // namespace

PackedMatrix::PackedMatrix(const ConstMatrix& b, ThreadPool& pool, bool gated)
    : kernels_(&active_kernels()), gated_(gated), dtype_(b.dtype), rows_(b.rows), cols_(b.cols) {
  COTERIE_CHECK(!gated || b.rows % 2 == 0, "a gated B has an even number of rows");
  const PanelsB panels = {kernels_, pack_source(b, b.rows, b.cols, nullptr, nullptr), dtype_, gated,
                          gated ? b.rows / 2 : b.rows};
  const int64_t panel_units = panels.panel_units();
  panels_ = AlignedBuffer(static_cast<size_t>(panels.count() * panel_units) * 4);
  pool.run(panels.count(), [&](int64_t p, int) { panels.pack(p, panels_.as<uint32_t>() + p * panel_units); });
}

void grouped_gemm(std::span<const GemmProblem> problems, ThreadPool& pool) {
  static thread_local GroupedGemm state;
  state.run(problems, pool);
}

}  // namespace coterie
