#include "base/dtype.h"

#include <cmath>
#include <cstring>
#include <string>

#include "base/check.h"
#include "coterie/error.h"

namespace coterie {
namespace {

struct Entry {
  DType dtype;
  std::string_view name;
};
constexpr Entry kEntries[] = {
    {DType::kF32, "fp32"}, {DType::kBF16, "bf16"}, {DType::kF16, "fp16"},  {DType::kI8, "int8"},
    {DType::kU8, "uint8"}, {DType::kI32, "int32"}, {DType::kI64, "int64"},
};

const Entry& entry(DType dtype) { return kEntries[static_cast<size_t>(dtype)]; }

}  // namespace

std::string_view dtype_name(DType dtype) { return entry(dtype).name; }

DType dtype_from_name(std::string_view name) {
  for (const Entry& e : kEntries) {
    if (e.name == name) return e.dtype;
  }
  throw InvalidArgument("dtype: '" + std::string(name) + "' is not one of fp32, bf16, fp16, int8, uint8, int32, int64");
}

float half_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const int mantissa = bits & 0x3ff;
  const float sign = (bits & 0x8000) ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
}

void convert_to_float(const void* source, DType dtype, float* out, size_t n) {
  if (dtype == DType::kF32) {
    if (n) std::memcpy(out, source, n * sizeof(float));
    return;
  }
  COTERIE_CHECK(dtype == DType::kBF16 || dtype == DType::kF16, "not a floating type");
  const auto* bytes = static_cast<const char*>(source);
  for (size_t i = 0; i < n; ++i) {
    uint16_t bits;  // files give no alignment, so read by memcpy
    std::memcpy(&bits, bytes + 2 * i, 2);
    out[i] = dtype == DType::kBF16 ? to_float(BFloat16{bits}) : half_to_float(bits);
  }
}

void convert_from_float(const float* source, DType dtype, void* out, size_t n) {
  if (dtype == DType::kF32) {
    if (n) std::memcpy(out, source, n * sizeof(float));
    return;
  }
  COTERIE_CHECK(dtype == DType::kBF16, "only fp32 and bf16 are written");
  auto* rounded = static_cast<BFloat16*>(out);
  for (size_t i = 0; i < n; ++i) rounded[i] = to_bfloat16(source[i]);
}

}  // namespace coterie
