#include "model/rope_scaling.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>

namespace coterie {
namespace {

// In fp32 steps, as PyTorch computes it, so that far positions turn by the same angle. Divided by factors, if any.
std::vector<float> plain_frequencies(double theta, int64_t rotary_dim, std::span<const double> factors = {}) {
  std::vector<float> result;
  for (int64_t i = 0; i < rotary_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(rotary_dim);
    const float factor = factors.empty() ? 1.0f : static_cast<float>(factors[i / 2]);
    result.push_back(1.0f / (factor * std::pow(static_cast<float>(theta), exponent)));
  }
  return result;
}

// The base for which the lowest frequency is stretched as far as the sequence is longer than the original context.
double dynamic_theta(const RopeScaling& s, double theta, int64_t rotary_dim, int64_t length) {
  if (length <= s.original_context || rotary_dim <= 2) return theta;
  const double stretch =
      s.factor * static_cast<double>(length) / static_cast<double>(s.original_context) - s.factor + 1;
  const auto d = static_cast<double>(rotary_dim);
  return theta * std::pow(stretch, d / (d - 2));
}

void stretch_as_llama3(const RopeScaling& s, std::vector<float>& frequencies) {
  const auto context = static_cast<float>(s.original_context);
  const auto factor = static_cast<float>(s.factor);
  const auto low = static_cast<float>(s.low_freq_factor), high = static_cast<float>(s.high_freq_factor);
  for (float& frequency : frequencies) {
    const float wavelength = 2.0f * std::numbers::pi_v<float> / frequency;
    if (wavelength > context / low) {
      frequency /= factor;
    } else if (wavelength >= context / high) {
      const float smooth = (context / wavelength - low) / (high - low);
      frequency = (1 - smooth) * frequency / factor + smooth * frequency;
    }
  }
}

void stretch_as_yarn(const RopeScaling& s, double theta, int64_t rotary_dim, std::vector<float>& frequencies) {
  const auto dim = static_cast<double>(rotary_dim);
  // The dimension that turns so many times within the original context.
  const auto dimension = [&](double turns) {
    return dim * std::log(static_cast<double>(s.original_context) / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(theta));
  };
  double low = dimension(s.beta_fast), high = dimension(s.beta_slow);
  if (s.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0), high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    const auto stretched = static_cast<float>(ramp);
    frequencies[i] = frequencies[i] / static_cast<float>(s.factor) * stretched + frequencies[i] * (1 - stretched);
  }
}

}  // namespace

double yarn_mscale(double factor, double mscale) { return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0; }

double RopeScaling::angle_factor(int64_t length) const {
  if (kind != RopeScalingKind::kYarn && kind != RopeScalingKind::kLongrope) return 1.0;
  const double own = length > original_context ? long_mscale : short_mscale;
  if (own != 0.0) return own;
  if (attention_factor != 0.0) return attention_factor;
  if (kind == RopeScalingKind::kLongrope) {
    return std::sqrt(1 + std::log(factor) / std::log(static_cast<double>(original_context)));
  }
  if (mscale != 0.0 && mscale_all_dim != 0.0) return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim);
  return yarn_mscale(factor, 1.0);
}

int64_t RopeScaling::turning_length(int64_t length) const {
  if (kind == RopeScalingKind::kDynamic) return std::max(length, original_context);
  if (kind == RopeScalingKind::kLongrope) return length > original_context ? original_context + 1 : original_context;
  return 1;
}

int64_t RopeScaling::longest_alike(int64_t length) const {
  const bool switches = kind == RopeScalingKind::kLongrope && length <= original_context;
  return switches ? original_context : std::numeric_limits<int64_t>::max();
}

int64_t RopeScaling::context(int64_t max_positions) const {
  const auto stretched = [&](int64_t positions) {
    const double reach = static_cast<double>(positions) * factor;
    return std::max(max_positions, static_cast<int64_t>(std::min(reach, static_cast<double>(int64_t{1} << 30))));
  };
  switch (kind) {
    case RopeScalingKind::kLinear:
    case RopeScalingKind::kDynamic:
      return stretched(max_positions);
    case RopeScalingKind::kYarn:
      return stretched(original_context);
    case RopeScalingKind::kLlama3:  // its files say the positions after the stretch
    case RopeScalingKind::kLongrope:
    case RopeScalingKind::kFactors:
    case RopeScalingKind::kNone:
      break;
  }
  return max_positions;
}

std::vector<float> rope_frequencies(const RopeScaling& scaling, double theta, int64_t rotary_dim, int64_t length) {
  if (scaling.kind == RopeScalingKind::kDynamic) theta = dynamic_theta(scaling, theta, rotary_dim, length);
  if (scaling.kind == RopeScalingKind::kLongrope) {
    const bool is_long = length > scaling.original_context;
    return plain_frequencies(theta, rotary_dim, is_long ? scaling.long_factors : scaling.short_factors);
  }
  std::vector<float> frequencies = plain_frequencies(theta, rotary_dim);
  switch (scaling.kind) {
    case RopeScalingKind::kLinear:
      for (float& frequency : frequencies) frequency /= static_cast<float>(scaling.factor);
      break;
    case RopeScalingKind::kLlama3:
      stretch_as_llama3(scaling, frequencies);
      break;
    case RopeScalingKind::kYarn:
      stretch_as_yarn(scaling, theta, rotary_dim, frequencies);
      break;
    case RopeScalingKind::kFactors:
      for (size_t i = 0; i < frequencies.size(); ++i) frequencies[i] /= static_cast<float>(scaling.factors[i]);
      break;
    case RopeScalingKind::kDynamic:
    case RopeScalingKind::kLongrope:
    case RopeScalingKind::kNone:
      break;
  }
  return frequencies;
}

}  // namespace coterie
