// Every ISA that this CPU runs against the obvious loops, on odd shapes, layouts and types.
//
// Tolerance: c = sum of K products, rounded once per step in fp32 (u = 2^-24). The classical bound of any
// summation order is |error| <= (K + 1) u S with S = sum |a b|; operands are compared after rounding to
// the panel's type, so their own rounding is no error. bf16 dot products (vdpbf16ps) treat denormals as
// zero, below any S of these tests. An activation has slope at most 1.13 and adds a few ulp of its value;
// for a gated product f(g) u the errors of g and u are multiplied by |u| 1.13 and |f(g)|, each at most
// 1.13 S. Rounding to bf16 adds half an ulp, 2^-9 relative.
#include "kernels/gemm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/gemm_plan.h"
#include "kernels/kernel_table.h"
#include "kernels/reference.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

// Results lie at cache lines, as those of tensors do.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t /*n*/) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <typename T>
using LineVector = std::vector<T, LineAllocator<T>>;

// A matrix of random numbers with its own memory, in any layout.
struct Storage {
  std::vector<float> floats;
  std::vector<BFloat16> halves;
  ConstMatrix view;

  // transposed: the element (r, c) lies at c * rows + r; padding adds a gap to the outer stride.
  Storage(int64_t rows, int64_t cols, DType dtype, bool transposed, int64_t padding, std::mt19937& random) {
    const int64_t inner = transposed ? rows : cols, outer = transposed ? cols : rows;
    std::normal_distribution<float> normal;
    floats.resize(static_cast<size_t>((inner + padding) * outer + 1));
    for (float& value : floats) value = normal(random);
    for (float value : floats) halves.push_back(to_bfloat16(value));
    const void* data = dtype == DType::kBF16 ? static_cast<const void*>(halves.data()) : floats.data();
    view = {data, dtype, outer, inner, inner + padding, 1};
    if (transposed) view = view.transposed();
  }
};

struct Case {
  int64_t M, N, K;
  DType a = DType::kF32, b = DType::kF32, c = DType::kF32;
  bool a_transposed = false, b_transposed = false;
  bool gather = false, gather_K = false, a_gather_K = false, bias = false, gated = false, accumulate = false,
       packed = false, slopes = false;
  Activation activation = Activation::kNone;
  int64_t padding = 0;
};

std::string describe(const Case& c, const KernelTable& kernels) {
  return std::string(kernels.name) + " M" + std::to_string(c.M) + " N" + std::to_string(c.N) + " K" +
         std::to_string(c.K) + " a " + std::string(dtype_name(c.a)) + " b " + std::string(dtype_name(c.b)) + " c " +
         std::string(dtype_name(c.c)) + (c.a_transposed ? " aT" : "") + (c.b_transposed ? " bT" : "") +
         (c.gather ? " gather" : "") + (c.gather_K ? " gatherK" : "") + (c.a_gather_K ? " a gatherK" : "") +
         (c.bias ? " bias" : "") + (c.gated ? " gated" : "") + (c.accumulate ? " accumulate" : "") +
         (c.packed ? " packed " : " ") + std::string(activation_name(c.activation));
}

double tolerance(const Case& c, double value, double sum_of_abs) {
  const double u = kUnitRoundoff;
  double error = static_cast<double>(c.K + 2) * u * sum_of_abs;  // one more step for the bias
  if (c.activation != Activation::kNone) error = 1.13 * error + 16 * u * std::abs(value);
  if (c.gated) error = 2 * 1.13 * error * sum_of_abs + 2 * u * std::abs(value);
  if (c.accumulate) error += 2 * u * (std::abs(value) + sum_of_abs);
  return error + std::abs(value) * (c.c == DType::kBF16 ? kBf16UnitRoundoff : u);
}

// A problem of the case with all the memory that it points to.
struct Fixture {
  std::mt19937 random{42};
  Storage a, b;
  std::vector<int32_t> rows, columns;
  std::vector<float> bias, slopes;
  LineVector<float> c_floats;
  LineVector<BFloat16> c_halves;
  GemmProblem problem;
  PackedMatrix packed;

  explicit Fixture(const Case& c)
      : a(c.gather ? 2 * c.M + 1 : c.M, c.a_gather_K ? c.K + 3 : c.K, c.a, c.a_transposed, c.padding, random),
        b(c.gated ? 2 * c.N : c.N, c.gather_K ? c.K + 3 : c.K, c.b, c.b_transposed, c.padding, random) {
    std::normal_distribution<float> normal;
    const int64_t b_rows = b.view.rows;
    problem.a = a.view;
    problem.b = b.view;
    for (int64_t m = 0; m < c.M; ++m) rows.push_back(static_cast<int32_t>(random() % (2 * c.M + 1)));
    for (int64_t k = 0; k < c.K; ++k) columns.push_back(static_cast<int32_t>(random() % (c.K + 3)));
    if (c.gather) problem.gather_M = rows.data();
    if (c.gather) problem.num_gathered = c.M;
    if (c.gather_K) problem.b_gather_K = columns.data();
    if (c.a_gather_K) problem.a_gather_K = columns.data();
    for (int64_t n = 0; n < b_rows; ++n) bias.push_back(normal(random));
    if (c.bias) problem.bias_N = bias.data();
    c_floats.resize(static_cast<size_t>(c.M * (c.N + c.padding) + 1));
    for (float& value : c_floats) value = normal(random);
    for (float value : c_floats) c_halves.push_back(to_bfloat16(value));
    void* out = c.c == DType::kBF16 ? static_cast<void*>(c_halves.data()) : c_floats.data();
    problem.c = {out, c.c, c.M, c.N, c.N + c.padding};
    slopes.resize(static_cast<size_t>(c.M * b_rows + 1));
    if (c.slopes) problem.slopes = row_major(slopes.data(), c.M, b_rows);
    problem.gated = c.gated;
    problem.activation = c.activation;
    problem.accumulate = c.accumulate;
  }

  void pack(ThreadPool& pool) {
    packed = PackedMatrix(b.view, pool, problem.gated);
    problem.packed_b = &packed;
    problem.b = {};
  }
};

void check(const Case& c, ThreadPool& pool) {
  SCOPED_TRACE(describe(c, active_kernels()));
  Fixture fixture(c);
  std::vector<double> expected(static_cast<size_t>(c.M * c.N)), absolute(expected.size());
  reference::gemm(fixture.problem, expected.data(), absolute.data());
  const LineVector<float> untouched = fixture.c_floats;
  if (c.packed) fixture.pack(pool);
  gemm(fixture.problem, pool);
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t n = 0; n < c.N; ++n) {
      const int64_t i = m * c.N + n;
      ASSERT_NEAR(reference::load(fixture.problem.c, m, n), expected[i], tolerance(c, expected[i], absolute[i]))
          << "at " << m << ", " << n;
    }
    for (int64_t n = c.N; n < c.N + c.padding; ++n) {  // the gap between rows belongs to somebody else
      const int64_t i = m * (c.N + c.padding) + n;
      if (c.c == DType::kF32) {
        ASSERT_EQ(fixture.c_floats[i], untouched[i]);
      }
    }
  }
}

constexpr int64_t kSizes[] = {0, 1, 2, 3, 7, 12, 13, 17, 31, 33, 65};

TEST(Gemm, ShapesOfAllTypes) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType type : {DType::kF32, DType::kBF16}) {
      for (int64_t M : kSizes) {
        for (int64_t N : {0, 1, 5, 16, 33, 64, 70}) {
          for (int64_t K : kSizes) {
            for (DType c : {DType::kF32, type}) check({.M = M, .N = N, .K = K, .a = type, .b = type, .c = c}, pool);
          }
        }
      }
    }
  });
}

TEST(Gemm, LayoutsAndConversions) {
  NativeThreadPool pool(2);
  const DType types[] = {DType::kF32, DType::kBF16};
  for_each_isa([&] {
    for (int bits = 0; bits < 512; ++bits) {
      Case c = {.M = 19, .N = 37, .K = 43};
      c.a = types[bits & 1];
      c.b = types[bits >> 1 & 1];
      c.c = types[bits >> 2 & 1];
      c.a_transposed = bits >> 3 & 1;
      c.b_transposed = bits >> 4 & 1;
      c.gather = bits >> 5 & 1;
      c.gather_K = bits >> 6 & 1;
      c.padding = bits >> 7 & 1 ? 3 : 0;
      c.a_gather_K = bits >> 8 & 1;
      if (c.gather_K && c.a_gather_K) continue;
      check(c, pool);
      c.M = 150;  // beyond kOwnPackPanels on every ISA: B is packed once for all
      check(c, pool);
    }
  });
}

// Above 8 MiB results go past the caches, where their rows begin at a vector of memory and where they don't; straight
// from registers and by way of an epilogue.
TEST(Gemm, LargeResults) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType c : {DType::kF32, DType::kBF16}) {
      const int64_t M = c == DType::kF32 ? 1100 : 2200;
      for (int64_t N : {2048, 2051}) {
        for (Activation activation : {Activation::kNone, Activation::kRelu}) {
          check({.M = M, .N = N, .K = 3, .b = c, .c = c, .activation = activation}, pool);
        }
      }
    }
  });
}

// Just below and just above the K from which sums take the way by a tile.
TEST(Gemm, SumsOfShortAndOfLongRows) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType type : {DType::kF32, DType::kBF16}) {
      for (int64_t K : {383, 384, 385, 767, 768, 769}) {
        check({.M = 25, .N = 96, .K = K, .a = type, .b = type, .c = type, .bias = true}, pool);
      }
    }
  });
}

// K that is multiplied in slices, the last one short.
TEST(Gemm, LongRowsInSlices) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType type : {DType::kF32, DType::kBF16}) {
      for (const auto& [M, N] : {std::pair{70, 40}, {100, 37}, {520, 9}}) {
        for (int variant = 0; variant < 5; ++variant) {
          const int64_t K = (type == DType::kF32 ? 1 : 2) * kMostUnitsAtOnce + (variant == 0 ? 1 : 229);
          Case c = {.M = M, .N = N, .K = K, .a = type, .b = type, .c = variant < 2 ? DType::kF32 : type};
          c.a_transposed = c.b_transposed = variant == 1;
          c.gather_K = variant == 2;
          c.gather = c.bias = c.gated = variant == 3;
          c.packed = c.accumulate = variant == 4;
          if (variant == 2) c.activation = Activation::kRelu;
          check(c, pool);
        }
      }
    }
  });
}

// As kernels on whole tiles do: rows of the tile that are not there are written too.
template <int kRows>
void multiply_whole_tile(int64_t units, const uint32_t* a, const uint32_t* b, Ahead ahead, float* tile, bool add) {
  const KernelTable& kernels = *supported_kernels().front();
  kernels.multiply[0][kRows - 1](units, a, b, ahead, tile, add);
  const int64_t columns = kernels.panel_columns();
  std::fill(tile + kRows * columns, tile + kMaxPanelRows * columns, std::numeric_limits<float>::quiet_NaN());
}
template <int... kIndex>
void fill_whole_tiles(KernelTable& table, std::integer_sequence<int, kIndex...>) {
  ((table.multiply[0][kIndex] = table.multiply[0][kIndex] ? multiply_whole_tile<kIndex + 1> : nullptr), ...);
}

TEST(Gemm, TilesThatWaitHaveRoomForAllRows) {
  KernelTable table = *supported_kernels().front();
  fill_whole_tiles(table, std::make_integer_sequence<int, kMaxPanelRows>{});
  table.slice_units[0] = 8 * kChunkUnits;
  const ScopedKernels scope(table);
  NativeThreadPool pool(1);
  for (int64_t K : {int64_t{500}, kMostUnitsAtOnce + 1}) {
    for (int64_t M : {5, 70, 200}) {
      for (bool transposed : {false, true}) check({.M = M, .N = 300, .K = K, .b_transposed = transposed}, pool);
      check({.M = M, .N = 300, .K = K, .packed = true}, pool);
    }
  }
}

TEST(Gemm, EpiloguesOnPackedAndPlainWeights) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (Activation activation : {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
                                  Activation::kSilu, Activation::kClampedSwiglu}) {
      for (int bits = 0; bits < 16; ++bits) {
        Case c = {.M = 9, .N = 41, .K = 21, .activation = activation};  // some sums pass the limits of the clamped one
        c.bias = bits & 1;
        c.gated = bits >> 1 & 1;
        if (activation == Activation::kClampedSwiglu && !c.gated) continue;
        c.packed = bits >> 2 & 1;
        c.b = bits >> 3 & 1 ? DType::kBF16 : DType::kF32;
        check(c, pool);
        c.accumulate = !c.gated && activation == Activation::kNone;
        c.c = DType::kBF16;
        check(c, pool);
      }
    }
  });
}

void expect_row(const Fixture& batch, GemmProblem row, int64_t m, const LineVector<float>& expected, ThreadPool& pool) {
  row.a = row.a.row_range(m, 1);
  row.c = row.c.row_range(m, 1);
  const int64_t N = row.c.cols;
  float* const out = static_cast<float*>(row.c.data);
  std::fill_n(out, N, 0.0f);
  gemm(row, pool);
  for (int64_t n = 0; n < N; ++n) ASSERT_EQ(out[n], expected[m * N + n]) << "at " << m << ", " << n;
  row.packed_b = nullptr;
  row.b = batch.b.view;
  std::fill_n(out, N, 0.0f);
  gemm(row, pool);
  for (int64_t n = 0; n < N; ++n) ASSERT_EQ(out[n], expected[m * N + n]) << "in place, at " << m << ", " << n;
}

// A row's bits depend on nothing but its own values: not on M, the number of threads, or packing. With a long K one
// thread multiplies slices of blocks with several panels of both operands, packed by it (70 rows) or A alone (300).
TEST(Gemm, RowsHaveTheSameBitsAloneAndInABatch) {
  NativeThreadPool one(1), two(2), three(3);
  constexpr int64_t kLong = 3 * kMostUnitsAtOnce;
  for_each_isa([&] {
    for (DType type : {DType::kF32, DType::kBF16}) {
      for (const auto& [M, N, K] : {std::tuple{200, 100, 301}, {300, 100, kLong}, {70, 1100, kLong + 77}}) {
        const Case c = {.M = M, .N = N, .K = K, .a = type, .b = type};
        SCOPED_TRACE(describe(c, active_kernels()));
        Fixture batch(c);
        gemm(batch.problem, one);
        const LineVector<float> expected = batch.c_floats;
        gemm(batch.problem, two);
        ASSERT_EQ(batch.c_floats, expected);
        batch.pack(three);
        for (ThreadPool* pool : {&one, &three}) {
          gemm(batch.problem, *pool);
          ASSERT_EQ(batch.c_floats, expected);
        }
        for (int64_t m = 0; m < c.M; m += 23) expect_row(batch, batch.problem, m, expected, two);
      }
    }
  });
}

// Operands in fp32 are rounded on the way to panels of bf16, and then multiplied as such, few rows and many.
TEST(Gemm, OperandsAreRoundedToTheTypeOfThePanels) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (int64_t M : {3, 30, 150}) {
      Fixture floats({.M = M, .N = 37, .K = 43});
      floats.problem.panels = DType::kBF16;
      Fixture halves({.M = M, .N = 37, .K = 43, .a = DType::kBF16, .b = DType::kBF16});
      gemm(floats.problem, pool);
      gemm(halves.problem, pool);
      EXPECT_EQ(floats.c_floats, halves.c_floats) << active_kernels().name << " M" << M;
    }
  });
}

// With few rows plain weights are read where they lie, and come to the bits of packed ones, epilogues and all.
TEST(Gemm, FewRowsHaveTheSameBitsInPlaceAndPacked) {
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (DType type : {DType::kF32, DType::kBF16}) {
      for (int64_t M : {1, 2, 5, 9, 12, 13, 16, 17, 24, 33, 63, 64, 65}) {
        for (int bits = 0; bits < 32; ++bits) {
          const bool whole = bits & 1;
          Case c = {.M = M, .N = whole ? 96 : 77, .K = whole ? 128 : 101, .b = type, .bias = true};
          c.a = bits >> 1 & 1 ? DType::kBF16 : DType::kF32;
          c.c = c.a;
          c.slopes = c.c == DType::kF32;
          c.gather = c.gated = bits >> 2 & 1;
          c.activation = c.gated ? Activation::kSilu : Activation::kNone;
          c.accumulate = !c.gated;
          c.padding = bits >> 3 & 1 ? 3 : 0;
          c.b_transposed = bits >> 4 & 1;
          SCOPED_TRACE(describe(c, active_kernels()));
          Fixture in_place(c), packed(c);
          packed.pack(pool);
          gemm(in_place.problem, pool);
          gemm(packed.problem, pool);
          ASSERT_EQ(in_place.slopes, packed.slopes);
          ASSERT_EQ(in_place.c_floats, packed.c_floats);
          for (size_t i = 0; i < packed.c_halves.size(); ++i) {
            ASSERT_EQ(to_float(in_place.c_halves[i]), to_float(packed.c_halves[i])) << i;
          }
        }
      }
    }
  });
}

// What lies behind the end of a row of B is not read into sums: infinity times the zeros that fill up A is NaN.
TEST(Gemm, FewRowsDoNotSeeWhatLiesBehindTheWeights) {
  NativeThreadPool pool(1);
  for_each_isa([&] {
    for (DType type : {DType::kF32, DType::kBF16}) {
      const Case c = {.M = 3, .N = 35, .K = 37, .b = type, .padding = 64};
      Fixture fixture(c);
      for (int64_t n = 0; n < c.N; ++n) {
        for (int64_t k = c.K; k < c.K + c.padding; ++k) {
          fixture.b.floats[n * (c.K + c.padding) + k] = std::numeric_limits<float>::infinity();
          fixture.b.halves[n * (c.K + c.padding) + k] = to_bfloat16(std::numeric_limits<float>::infinity());
        }
      }
      gemm(fixture.problem, pool);
      for (int64_t m = 0; m < c.M; ++m) {
        for (int64_t n = 0; n < c.N; ++n) ASSERT_TRUE(std::isfinite(reference::load(fixture.problem.c, m, n)));
      }
    }
  });
}

TEST(Gemm, GroupsOfUnequalProblems) {
  NativeThreadPool pool(3);
  for_each_isa([&] {
    std::vector<Case> cases = {{.M = 0, .N = 40, .K = 8},   {.M = 300, .N = 70, .K = 90}, {.M = 1, .N = 33, .K = 5},
                               {.M = 5, .N = 0, .K = 9},    {.M = 7, .N = 19, .K = 0},    {.M = 80, .N = 64, .K = 64},
                               {.M = 2, .N = 200, .K = 300}};
    std::vector<std::unique_ptr<Fixture>> fixtures;
    std::vector<GemmProblem> problems;
    std::vector<std::vector<double>> expected, absolute;
    for (const Case& c : cases) {
      fixtures.push_back(std::make_unique<Fixture>(c));
      problems.push_back(fixtures.back()->problem);
      expected.emplace_back(static_cast<size_t>(c.M * c.N));
      absolute.emplace_back(static_cast<size_t>(c.M * c.N));
      reference::gemm(problems.back(), expected.back().data(), absolute.back().data());
    }
    grouped_gemm(problems, pool);
    for (size_t i = 0; i < cases.size(); ++i) {
      for (size_t j = 0; j < expected[i].size(); ++j) {
        ASSERT_NEAR(fixtures[i]->c_floats[j], expected[i][j], tolerance(cases[i], expected[i][j], absolute[i][j]));
      }
    }
    grouped_gemm({}, pool);
  });
}

TEST(Gemm, PanelsOfFewRowsAreTheOnlyOnes) {
  for (int most : {1, 2, 4, 6, 12, 32}) {
    for (int64_t M = 1; M <= 6 * most; ++M) {
      const RowPanels panels = {M, ceil_div(M, most)};
      for (int64_t p = 0; p < panels.P; ++p) {
        EXPECT_TRUE(panels.P == 1 || !is_only_panel(panels.rows(p), most)) << M << " rows, at most " << most;
      }
    }
  }
  EXPECT_TRUE(is_only_panel(5, 12));  // 13 rows are 7 and 6
}

TEST(Gemm, RejectsOurOwnMistakes) {
  NativeThreadPool pool(1);
  Fixture fixture({.M = 2, .N = 3, .K = 4});
  GemmProblem wrong = fixture.problem;
  wrong.c.cols = 2;
  EXPECT_THROW(gemm(wrong, pool), std::logic_error);
  wrong = fixture.problem;
  wrong.a.cols = 3;
  EXPECT_THROW(gemm(wrong, pool), std::logic_error);
  fixture.pack(pool);
  wrong = fixture.problem;
  wrong.gated = true;
  EXPECT_THROW(gemm(wrong, pool), std::logic_error);
}

}  // namespace
}  // namespace coterie
