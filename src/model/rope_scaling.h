// How rotary positions are stretched beyond the context a model was first trained with, and the frequencies
// that follow. Everything as Hugging Face's modeling_rope_utils.py defines it.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace coterie {

// kFactors: every frequency is divided by a factor of its own, as GGUF files have Llama 3's scaling.
enum class RopeScalingKind { kNone, kLinear, kDynamic, kLlama3, kYarn, kLongrope, kFactors };

struct RopeScaling {
  RopeScalingKind kind = RopeScalingKind::kNone;
  double factor = 1.0;           // at least 1
  int64_t original_context = 0;  // positions before the stretch; of kDynamic, kLlama3, kYarn and kLongrope
  // kLlama3: wavelengths above original_context / low are stretched, those below original_context / high are not.
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  // kYarn (Peng et al. 2023): dimensions that turn more than beta_fast times in the original context stay, those that
  // turn less than beta_slow times are stretched; `truncate` rounds the bounds between them to whole dimensions.
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  bool truncate = true;
  double attention_factor = 0.0;  // of queries and keys each; 0: by factor, and by the two below when both are given
  double mscale = 0.0;
  double mscale_all_dim = 0.0;
  // kLongrope (Ding et al. 2024): every frequency is divided by a factor of its own, in sequences up to
  // original_context by another one than in longer ones. So are the attention factors of both, the mscales; where they
  // are 0, attention_factor counts, and where that is 0, factor and original_context.
  std::vector<double> short_factors = {}, long_factors = {};  // [rotary_dim / 2]
  double short_mscale = 0.0;
  double long_mscale = 0.0;
  std::vector<double> factors = {};  // kFactors, [rotary_dim / 2]

  // What cosines and sines are multiplied by in a sequence of that length.
  double angle_factor(int64_t length) const;

  // Stands for all lengths at which sequences turn alike, and is one of them.
  int64_t turning_length(int64_t length) const;

  // The length up to which keys in the cache serve a sequence that had this length when they were computed; then all of
  // it turns otherwise. No limit under kDynamic, whose keys stay as they came into the cache.
  int64_t longest_alike(int64_t length) const;

  // The positions that the stretched rotation reaches, of a model that says it has `max_positions`.
  int64_t context(int64_t max_positions) const;

  bool operator==(const RopeScaling&) const = default;
};

// Angles per position step, [rotary_dim / 2]. `length` matters to kDynamic, whose base grows with the length of the
// sequence, and to kLongrope.
std::vector<float> rope_frequencies(const RopeScaling& scaling, double theta, int64_t rotary_dim, int64_t length);

// 1 + 0.1 mscale log(factor), or 1 without a stretch.
double yarn_mscale(double factor, double mscale);

}  // namespace coterie
