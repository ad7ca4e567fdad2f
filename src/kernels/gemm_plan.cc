#include "kernels/gemm_plan.h"

#include <algorithm>

#include "base/check.h"

namespace coterie {
namespace {

// Panels of A that a task multiplies with one panel of B after the other: most of the L2 caches of today's
// servers (1 to 2 MiB).
constexpr int64_t kBlockABytes = 1 << 20;
// Panels of B that a task packs at once, so that a row of a transposed source is read in long pieces.
constexpr int64_t kGroupBBytes = 512 << 10;
// B in bf16 of an ISA that multiplies that as fp32 is packed as bf16 for so many rows of A, since it is read from
// memory then, and as fp32 for more.
constexpr int64_t kMostRowsWidenedInRegisters = 64;
// With at most so many rows of A, B is read where it lies: along K, along N. (With twice as many, packing it costs
// about as much. Along K, bf16 that is widened is read so by few_rows alone.)
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
// With at most so many units of K, sums that become C as they are go there straight from registers. With more it would
// save nothing, and costs some percent as measured.
constexpr int64_t kMostUnitsIntoRows = 384;

PackSource pack_source(const ConstMatrix& m, int64_t rows, int64_t cols, const int32_t* gather_rows,
                       const int32_t* gather_cols) {
  return {m.data, m.dtype, rows, cols, m.row_stride, m.col_stride, gather_rows, gather_cols};
}

void check_problem(const GemmProblem& p) {
  COTERIE_CHECK(p.packed_b == nullptr || p.b.data == nullptr, "both b and packed_b are given");
  COTERIE_CHECK(!p.a_gather_K || (!p.packed_b && !p.b_gather_K), "nobody says what K is");
  const bool transformed = p.gated || p.activation != Activation::kNone;
  COTERIE_CHECK(!(p.accumulate && transformed), "accumulate with an activation");
  COTERIE_CHECK(!p.slopes.data || p.slopes.dtype == p.c.dtype, "the slopes have another type than C");
  const int64_t b_rows = p.packed_b ? p.packed_b->rows() : p.b.rows;
  const int64_t b_cols = p.packed_b ? p.packed_b->cols() : (p.b_gather_K ? p.K() : p.b.cols);
  COTERIE_CHECK(p.K() == 0 || b_cols == p.K(), "K of A and B differ");
  COTERIE_CHECK(b_rows == (p.gated ? 2 : 1) * p.c.cols, "N of B and C differ");
  COTERIE_CHECK((p.gather_M ? p.num_gathered : p.a.rows) == p.c.rows, "M of A and C differ");
  COTERIE_CHECK(!p.packed_b || p.packed_b->gated() == p.gated, "B was packed for another kind of problem");
  COTERIE_CHECK(!p.packed_b || b_rows == 0 || p.packed_b->kernels() == &active_kernels(),
                "B was packed for another ISA");
  const bool quantized = p.packed_b && is_quantized(p.packed_b->type());
  COTERIE_CHECK(!quantized || p.a.col_stride == 1, "A of quantized weights has contiguous rows");
  COTERIE_CHECK(quantized || !p.quantized_a, "A is quantized, and B is not");
}

// Where rows of A are so few that packing B would not pay, and it lies such that it can be read as it is.
InPlace in_place(const GemmProblem& p, PanelType type, const KernelTable& kernels, int64_t group_b_bytes) {
  const bool bf16 = type == PanelType::kBF16;
  if (!p.b.data || panel_type(p.b.dtype) != type || p.b_gather_K) return InPlace::kNo;
  if (p.b.col_stride == 1) {
    if (p.c.rows <= kernels.few_rows[bf16]) return InPlace::kFewAlongK;
    return p.c.rows <= kMostRowsAlongK && kernels.multiply_along_k[bf16] ? InPlace::kAlongK : InPlace::kNo;
  }
  const bool along_n = p.b.row_stride == 1 && p.c.rows <= kMostRowsAlongN[bf16];
  return along_n && (!bf16 || group_b_bytes <= kCachedBBytes) ? InPlace::kAlongN : InPlace::kNo;
}

bool goes_into_rows(const GemmProblem& p, const PanelsB& b, int64_t units) {
  if (is_quantized(b.type) || b.compact || units > kMostUnitsIntoRows) return false;
  const bool as_they_are = p.activation == Activation::kNone && !p.gated && !p.accumulate && !p.slopes.data;
  return as_they_are && b.kernels->multiply_into_rows[index_of(b.type)][0];
}

// The type of B's panels. Widened ones give the same bits where there is nothing to round.
PanelType type_of_panels(const GemmProblem& p, const KernelTable& kernels) {
  if (p.packed_b) return p.packed_b->type();
  const PanelType type = panel_type(p.panels.value_or(p.b.dtype));
  const bool exact = p.a.dtype == DType::kBF16 && p.b.dtype == DType::kBF16;
  return exact && p.c.rows > kMostRowsWidenedInRegisters ? kernels.type_of_a(type) : type;
}

Plan make_plan(const GemmProblem& p, const KernelTable& kernels, int64_t group_b_bytes) {
  check_problem(p);
  Plan plan = {};
  plan.problem = &p;
  const int64_t K = p.K(), N = p.c.cols;
  const PanelType type = type_of_panels(p, kernels);
  const int64_t most_rows = kernels.panel_rows[index_of(type)];
  plan.rows = {p.c.rows, ceil_div(p.c.rows, most_rows)};
  plan.a = pack_source(p.a, p.c.rows, K, p.gather_M, p.a_gather_K);
  plan.a.quantized = p.quantized_a;
  plan.b = {&kernels,
            pack_source(p.b, p.gated ? 2 * N : N, K, nullptr, p.b_gather_K),
            type,
            p.gated,
            p.packed_b && p.packed_b->shape().compact,
            N};
  plan.units = units_of(type, K);
  plan.Q = plan.b.count();
  plan.into_rows = goes_into_rows(p, plan.b, plan.units);
  plan.in_place = in_place(p, type, kernels, group_b_bytes);
  return plan;
}

// Whether the tasks pack B: where A has few panels, or few enough for a cache. But with a small B the work is writing
// C, and where that stays in the caches, tasks should have whole rows of it: columns of a matrix compete for a part of
// the places in a cache.
bool should_own_b(const Plan& plan) {
  if (plan.problem->packed_b || plan.in_place != InPlace::kNo) return false;
  const bool by_rows = !plan.stream && plan.Q * plan.b.panel_units() <= kInlinePackUnits;
  const int64_t most_bytes = kSharedABytes[plan.b.type == PanelType::kBF16];
  return plan.P() <= kFewPanelsA || (4 * plan.all_a_units() <= most_bytes && !by_rows);
}

// All of K where it is not long, where B is read once anyway, and where kernels take no less.
int64_t units_of_slice(const Plan& plan) {
  const bool whole = plan.in_place != InPlace::kNo || is_quantized(plan.b.type) || plan.b.compact;
  if (whole || plan.P() == 1 || plan.units <= kMostUnitsAtOnce) return plan.units;
  return whole_chunks(ceil_div(plan.units, ceil_div(plan.units, kMostUnitsOfSlice)));
}

// Chooses blocks so that a task costs about `share`, within bounds, and numbers the tasks. The upper bound is one of a
// slice.
void cut_plan(Plan& plan, double share, int64_t first_task) {
  const int64_t P = plan.P(), Q = plan.Q;
  plan.own_b = should_own_b(plan);
  plan.slice_units = units_of_slice(plan);
  const auto slices = static_cast<double>(plan.in_slices() ? ceil_div(plan.units, plan.slice_units) : 1);
  const double most = std::clamp(share, kLeastTaskCost, kMostTaskCost * slices);
  const int64_t panel_bytes = 4 * ceil_div(plan.rows.M * plan.slice_row_units(), P);
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
    const int64_t group_b = plan.slice_b().group();
    if (plan.own_b && plan.block_Q > group_b) plan.block_Q -= plan.block_Q % group_b;
    // To pack A anew costs no more than to write it to memory and read it from there, or, where it is one panel, than
    // to have all threads wait for it.
    const bool few_packs = ceil_div(Q, plan.block_Q) <= kMostPacksOfA;
    plan.own_a = few_packs && (plan.own_b ? 4 * plan.all_a_units() <= kBlockABytes : plan.problem->packed_b && P == 1);
  }
  plan.first_task = first_task;
  plan.num_tasks = ceil_div(P, plan.block_P) * ceil_div(Q, plan.block_Q);
}

}  // namespace

int64_t PanelsB::group() const {
  return std::clamp<int64_t>(kGroupBBytes / std::max<int64_t>(4 * panel_units(), 1), 1, kMostGroupB);
}

void PanelsB::pack(int64_t first, int64_t last, uint32_t* memory) const {
  for (int64_t p = first; p < last; p += group()) {
    const int64_t end = std::min(p + group(), last);
    kernels->pack_b(source, type, N, gated, p, end, memory + (p - first) * panel_units());
  }
}

PanelsB Plan::slice_b() const {
  PanelsB slice = b;
  slice.source.cols = slice_cols();
  return slice;
}

PackSource columns_of(PackSource source, int64_t first, int64_t cols) {
  if (source.gather_cols) {
    source.gather_cols += first;
  } else {
    const auto size = static_cast<int64_t>(dtype_size(source.dtype));
    source.data = static_cast<const char*>(source.data) + first * source.col_stride * size;
  }
  source.cols = std::min(source.cols - first, cols);
  return source;
}

double Plan::cost(int64_t panels_a, int64_t panels_b) const {
  const double m = static_cast<double>(panels_a) * static_cast<double>(rows.M) / static_cast<double>(P());
  return static_cast<double>(panels_b * b.panel_units()) * (m + kUnitCost) + m;
}

void cut_group(std::span<const GemmProblem> problems, int num_threads, std::vector<Plan>& plans) {
  const KernelTable& kernels = active_kernels();
  plans.clear();
  double total = 0;
  int64_t b_bytes = 0, c_bytes = 0;
  for (const GemmProblem& p : problems) b_bytes += p.b.rows * p.b.cols * static_cast<int64_t>(dtype_size(p.b.dtype));
  for (const GemmProblem& problem : problems) {
    const Plan plan = make_plan(problem, kernels, b_bytes);
    // Leaving it out keeps first_task increasing.
    if (plan.P() == 0 || plan.Q == 0) continue;
    plans.push_back(plan);
    total += plan.cost(plan.P(), plan.Q);
    c_bytes += problem.c.rows * problem.c.cols * static_cast<int64_t>(dtype_size(problem.c.dtype));
  }
  int64_t first_task = 0;
  for (Plan& plan : plans) {
    plan.stream = c_bytes > kStreamBytes && !plan.problem->accumulate;
    cut_plan(plan, total / (num_threads * kTasksPerThread), first_task);
    first_task += plan.num_tasks;
  }
}

}  // namespace coterie
