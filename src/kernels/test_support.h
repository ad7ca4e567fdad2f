// For tests only.
#pragma once

#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/kernel_table.h"

namespace coterie {

inline constexpr double kUnitRoundoff = 0x1p-24;  // of fp32
inline constexpr double kBf16UnitRoundoff = 0x1p-8;

// Runs the body once for every ISA that this CPU runs.
template <typename Body>
void for_each_isa(const Body& body) {
  for (const KernelTable* table : supported_kernels()) {
    SCOPED_TRACE(table->name);
    const ScopedKernels scope(*table);
    body();
  }
}

inline std::vector<float> random_floats(int64_t n, std::mt19937& random, float deviation = 1.0f) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

inline std::vector<BFloat16> rounded(const std::vector<float>& values) {
  std::vector<BFloat16> halves;
  for (float value : values) halves.push_back(to_bfloat16(value));
  return halves;
}

}  // namespace coterie
