#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "base/philox.h"
#include "kernels/kernel_table.h"

namespace coterie {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;
constexpr int64_t kLanes = 16;  // independent maxima or sums, which the compiler turns into vectors
constexpr int64_t kBlock = 512;

struct Candidate {
  int32_t token;
  float logit;
  double weight;  // exp(logit / temperature), relative to the largest

  bool operator<(const Candidate& other) const {  // less likely; of equals, the higher id
    return logit != other.logit ? logit < other.logit : token > other.token;
  }
};

float maximum(std::span<const float> x) {
  float most[kLanes];
  std::fill(most, most + kLanes, kForbidden);
  size_t i = 0;
  for (; i + kLanes <= x.size(); i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
  }
  for (; i < x.size(); ++i) most[0] = std::max(most[0], x[i]);
  return *std::max_element(most, most + kLanes);
}

double sum(std::span<const float> x) {
  float sums[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= x.size(); i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane];
  }
  double total = 0;
  for (; i < x.size(); ++i) total += x[i];
  for (const float lane : sums) total += lane;
  return total;
}

// The k-th largest value: a heap of the k largest so far, which few values enter.
float kth_largest(std::span<const float> x, int64_t k) {
  if (k >= static_cast<int64_t>(x.size())) return kForbidden;
  std::vector<float> largest(x.begin(), x.begin() + k);
  std::ranges::make_heap(largest, std::greater{});
  for (const float value : x.subspan(k)) {
    if (value <= largest.front()) continue;
    std::ranges::pop_heap(largest, std::greater{});
    largest.back() = value;
    std::ranges::push_heap(largest, std::greater{});
  }
  return largest.front();
}

std::vector<Candidate> candidates_from(std::span<const float> logits_V, float least, float most, float temperature) {
  std::vector<Candidate> candidates;
  for (size_t i = 0; i < logits_V.size(); ++i) {
    if (logits_V[i] < least || logits_V[i] == kForbidden) continue;
    const double scaled = (static_cast<double>(logits_V[i]) - most) / temperature;
    candidates.push_back({static_cast<int32_t>(i), logits_V[i], std::exp(scaled)});
  }
  return candidates;
}

double sum(const std::vector<Candidate>& candidates) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

// The likeliest whose weights reach `enough`, one at least. A heap rather than a sort, since usually few come out.
std::vector<Candidate> keep_likeliest(std::vector<Candidate> candidates, double enough) {
  std::make_heap(candidates.begin(), candidates.end());
  std::vector<Candidate> kept;
  for (double mass = 0; !candidates.empty() && (kept.empty() || mass < enough); mass += kept.back().weight) {
    std::pop_heap(candidates.begin(), candidates.end());
    kept.push_back(candidates.back());
    candidates.pop_back();
  }
  return kept;
}

// Uniform in [0, 1) with 53 bits.
double uniform(uint64_t seed, int64_t completion, int64_t position) {
  const auto words = philox(seed, static_cast<uint64_t>(completion), static_cast<uint64_t>(position));
  const uint64_t bits = (uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

int32_t choose(const std::vector<Candidate>& candidates, double random) {
  double rest = random * sum(candidates);
  for (const Candidate& candidate : candidates) {
    rest -= candidate.weight;
    if (rest < 0) return candidate.token;
  }
  return candidates.front().token;  // rounding left a crumb
}

// exp(logit / temperature) of all tokens, relative to the largest, in memory of the thread.
std::span<const float> weights_of(std::span<const float> logits_V, float temperature) {
  static thread_local std::vector<float> weights_V;
  weights_V.resize(logits_V.size());
  const auto V = static_cast<int64_t>(logits_V.size());
  active_kernels().exponentials_row(logits_V.data(), V, 1.0f / temperature, weights_V.data(), DType::kF32);
  return weights_V;
}

int32_t choose_among_all(std::span<const float> weights_V, int32_t likeliest, double random) {
  double rest = random * sum(weights_V);
  for (size_t first = 0; first < weights_V.size(); first += kBlock) {
    const auto block = weights_V.subspan(first, std::min<size_t>(kBlock, weights_V.size() - first));
    const double mass = sum(block);
    if (rest >= mass) {
      rest -= mass;
      continue;
    }
    for (size_t i = 0; i < block.size(); ++i) {
      rest -= block[i];
      if (rest < 0) return static_cast<int32_t>(first + i);
    }
  }
  return likeliest;  // rounding left a crumb
}

// The candidates that together weigh at least top_p of all: first those near the likeliest, which mostly suffice.
std::vector<Candidate> nucleus(std::span<const float> logits_V, float most, const SamplingParams& params) {
  const double enough = params.top_p * sum(weights_of(logits_V, params.temperature));
  for (const float factor : {1e-2f, 1e-4f, 0.0f}) {
    const float least = factor > 0 ? most + params.temperature * std::log(factor) : kForbidden;
    std::vector<Candidate> candidates = candidates_from(logits_V, least, most, params.temperature);
    if (factor > 0 && sum(candidates) < enough) continue;
    return keep_likeliest(std::move(candidates), enough);
  }
  return {};
}

void keep_allowed(std::span<const uint32_t> allowed, std::span<float> logits_V) {
  for (size_t v = 0; v < logits_V.size(); ++v) {
    if (!(allowed[v / 32] >> (v % 32) & 1u)) logits_V[v] = kForbidden;
  }
}

}  // namespace

void change_logits(const LogitsChange& change, std::span<float> logits_V) {
  const SamplingParams& params = change.params;
  if (!change.allowed.empty()) keep_allowed(change.allowed, logits_V);
  if (!change.may_end) {
    for (const int64_t token : change.end_token_ids) {
      if (token >= 0 && token < static_cast<int64_t>(logits_V.size())) logits_V[token] = kForbidden;
    }
  }
  for (const auto& [token, bias] : params.logit_bias) logits_V[token] += bias;
  for (const auto& [token, in_output] : change.counts.in_output()) {
    float& logit = logits_V[token];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    logit -= params.frequency_penalty * static_cast<float>(in_output);
    if (in_output > 0) logit -= params.presence_penalty;
  }
}

int32_t sample(std::span<const float> logits_V, const SamplingParams& params, int64_t completion, int64_t position) {
  const float most = maximum(logits_V);
  if (most == kForbidden) return kNoToken;
  const auto likeliest = static_cast<int32_t>(std::ranges::find(logits_V, most) - logits_V.begin());
  if (params.temperature < kGreedyBelow) return likeliest;

  const double random = uniform(params.seed, completion, position);
  float least = params.min_p > 0 ? most + params.temperature * std::log(params.min_p) : kForbidden;
  if (params.top_k > 0) least = std::max(least, kth_largest(logits_V, params.top_k));
  if (least == kForbidden) {
    if (params.top_p < 1) return choose(nucleus(logits_V, most, params), random);
    return choose_among_all(weights_of(logits_V, params.temperature), likeliest, random);
  }
  std::vector<Candidate> candidates = candidates_from(logits_V, least, most, params.temperature);
  if (params.top_p < 1) {
    const double enough = params.top_p * sum(candidates);
    candidates = keep_likeliest(std::move(candidates), enough);
  }
  return choose(candidates, random);
}

PositionLogprobs position_logprobs(std::span<const float> logits_V, int32_t chosen, int64_t num_top) {
  const auto log_sum = static_cast<float>(std::log(sum(weights_of(logits_V, 1.0f))));
  const float shift = maximum(logits_V) + log_sum;
  PositionLogprobs result;
  result.chosen = {chosen, logits_V[chosen] - shift};
  result.rank = 1 + std::ranges::count_if(logits_V, [&](float logit) { return logit > logits_V[chosen]; });
  if (num_top == 0) return result;
  const float least = kth_largest(logits_V, num_top);
  for (size_t v = 0; v < logits_V.size(); ++v) {
    if (logits_V[v] >= least) result.top.push_back({static_cast<int32_t>(v), logits_V[v] - shift});
  }
  std::ranges::stable_sort(result.top, std::greater{}, &TokenLogprob::logprob);
  if (static_cast<int64_t>(result.top.size()) > num_top) result.top.resize(num_top);
  return result;
}

}  // namespace coterie
