// Whole numbers rounded up. The type of the result is that of the first argument.
#pragma once

#include <type_traits>

namespace coterie {

// a / b, for a >= 0 and b > 0.
template <typename Int>
constexpr Int ceil_div(Int a, std::type_identity_t<Int> b) {
  return (a + b - 1) / b;
}

// The least multiple of `unit` that is not below `value`.
template <typename Int>
constexpr Int round_up(Int value, std::type_identity_t<Int> unit) {
  return ceil_div(value, unit) * unit;
}

}  // namespace coterie
