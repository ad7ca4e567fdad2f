#include "io/mxfp4.h"

#include <cmath>
#include <limits>

namespace coterie {
namespace {

constexpr float kValues[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

}  // namespace

float mxfp4_value(int code) { return kValues[code]; }

float mxfp4_scale(uint8_t scale) {
  return scale == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, scale - 127);
}

void decode_mxfp4(std::span<const std::byte> codes, std::span<const std::byte> scales, float* out) {
  constexpr int64_t kBytes = kMxfp4Block / 2;
  for (size_t block = 0; block < scales.size(); ++block) {
    const float scale = mxfp4_scale(std::to_integer<uint8_t>(scales[block]));
    for (int64_t i = 0; i < kBytes; ++i) {
      const int byte = std::to_integer<int>(codes[block * kBytes + static_cast<size_t>(i)]);
      *out++ = scale * kValues[byte & 15];
      *out++ = scale * kValues[byte >> 4];
    }
  }
}

}  // namespace coterie
