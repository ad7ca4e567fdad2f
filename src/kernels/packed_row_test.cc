// Rows that are read out of packed matrices against the matrices that were packed: bit by bit.
#include <gtest/gtest.h>

#include <optional>
#include <random>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/packed_matrix.h"
#include "kernels/test_support.h"

namespace coterie {
namespace {

// Row by row what element(n, k) says.
template <typename Element>
void expect_rows(const PackedMatrix& packed, const Element& element) {
  std::vector<float> row(static_cast<size_t>(packed.cols()) + 1, 77.0f);
  for (int64_t n = 0; n < packed.rows(); ++n) {
    packed.read_row(n, row.data());
    for (int64_t k = 0; k < packed.cols(); ++k) ASSERT_EQ(row[k], element(n, k)) << n << ", " << k;
    ASSERT_EQ(row.back(), 77.0f) << "written behind the row";
  }
}

struct Size {
  int64_t rows, cols;
};
// Whole panels and parts of them, whole groups and chunks and parts of them.
constexpr Size kSizes[] = {{1, 1}, {5, 3}, {32, 64}, {33, 65}, {47, 96}, {70, 257}, {64, 600}};

TEST(PackedRow, IsWhatWasPacked) {
  std::mt19937 random(1);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (const auto [rows, cols] : kSizes) {
      SCOPED_TRACE(testing::Message() << rows << " x " << cols);
      const std::vector<float> values = random_floats(rows * cols, random);
      const std::vector<BFloat16> halves = rounded(values);
      expect_rows(PackedMatrix(row_major(values.data(), rows, cols), pool),
                  [&](int64_t n, int64_t k) { return values[n * cols + k]; });
      expect_rows(PackedMatrix(row_major(halves.data(), DType::kBF16, rows, cols), pool),
                  [&](int64_t n, int64_t k) { return to_float(halves[n * cols + k]); });
    }
  });
}

TEST(PackedRow, OfCompactPanelsWithTheirPatches) {
  std::mt19937 random(2);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (const auto [rows, cols] : kSizes) {
      SCOPED_TRACE(testing::Message() << rows << " x " << cols);
      std::vector<BFloat16> halves = rounded(random_floats(rows * cols, random, 0.02f));
      for (size_t i = 0; i < halves.size(); i += 977) halves[i] = to_bfloat16(i % 2 ? -1e-12f : 0.0f);
      const PackedMatrix plain(row_major(halves.data(), DType::kBF16, rows, cols), pool);
      const std::optional<PackedMatrix> compact = plain.compacted(pool);
      ASSERT_TRUE(compact);
      expect_rows(*compact, [&](int64_t n, int64_t k) { return to_float(halves[n * cols + k]); });
    }
  });
}

TEST(PackedRow, OfQuantizedPanels) {
  std::mt19937 random(3);
  NativeThreadPool pool(2);
  for_each_isa([&] {
    for (PanelType type : {PanelType::kInt8, PanelType::kInt8A16, PanelType::kInt4Group64, PanelType::kInt4}) {
      for (const auto [rows, cols] : kSizes) {
        SCOPED_TRACE(testing::Message() << index_of(type) << ": " << rows << " x " << cols);
        const std::vector<float> values = random_floats(rows * cols, random);
        const QuantizedMatrix codes(row_major(values.data(), rows, cols), type, pool);
        expect_rows(PackedMatrix(codes.view(), pool), [&](int64_t n, int64_t k) { return codes.view().element(n, k); });
      }
    }
    QuantizedMatrix mxfp4(PanelType::kMxfp4, 40, 96);
    for (int64_t i = 0; i < 40 * mxfp4.view().row_words(); ++i) mxfp4.codes()[i] = static_cast<uint32_t>(random());
    for (int64_t i = 0; i < 40 * 3; ++i) mxfp4.scales()[i] = to_bfloat16(i % 2 == 0 ? 0.25f : 4.0f);
    expect_rows(PackedMatrix(mxfp4.view(), pool), [&](int64_t n, int64_t k) { return mxfp4.view().element(n, k); });
  });
}

}  // namespace
}  // namespace coterie
