#include "engine/sampler.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "base/philox.h"
#include "coterie/error.h"

namespace coterie {
namespace {

struct Candidate {
  int32_t token;
  double weight;  // exp(logit / temperature), relative to the largest

  bool operator<(const Candidate& other) const {  // less likely; of equals, the higher id
    return weight != other.weight ? weight < other.weight : token > other.token;
  }
};

double sum(const std::vector<Candidate>& candidates) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

// A heap rather than a sort, since usually few of the many tokens come out.
class LikeliestFirst {
 public:
  explicit LikeliestFirst(std::vector<Candidate> candidates) : heap_(std::move(candidates)) {
    std::make_heap(heap_.begin(), heap_.end());
  }
  bool empty() const { return heap_.empty(); }
  const Candidate& top() const { return heap_.front(); }
  Candidate pop() {
    std::pop_heap(heap_.begin(), heap_.end());
    const Candidate candidate = heap_.back();
    heap_.pop_back();
    return candidate;
  }

 private:
  std::vector<Candidate> heap_;
};

std::vector<Candidate> keep_top_k(std::vector<Candidate> candidates, int64_t top_k) {
  LikeliestFirst heap(std::move(candidates));
  std::vector<Candidate> kept;
  while (!heap.empty()) {
    if (static_cast<int64_t>(kept.size()) >= top_k && heap.top().weight != kept.back().weight) break;
    kept.push_back(heap.pop());
  }
  return kept;
}

std::vector<Candidate> keep_top_p(std::vector<Candidate> candidates, double top_p) {
  const double enough = top_p * sum(candidates);
  LikeliestFirst heap(std::move(candidates));
  std::vector<Candidate> kept;
  for (double mass = 0; !heap.empty() && mass < enough; mass += kept.back().weight) kept.push_back(heap.pop());
  return kept;
}

std::string shown(float value) {
  char digits[32];
  return std::string(digits, std::to_chars(digits, digits + sizeof(digits), value).ptr);
}

// Uniform in [0, 1) with 53 bits.
double uniform(uint64_t seed, int64_t position) {
  const auto words = philox(seed, 0, static_cast<uint64_t>(position));
  const uint64_t bits = (uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

}  // namespace

void SamplingParams::validate() const {
  const auto refuse = [](const std::string& what) { throw InvalidArgument(what); };
  if (max_new_tokens < 1) refuse("max_new_tokens: " + std::to_string(max_new_tokens) + " is below 1");
  if (!(temperature >= 0) || std::isinf(temperature)) {
    refuse("temperature: " + shown(temperature) + " is not zero or positive");
  }
  if (top_k < 0) refuse("top_k: " + std::to_string(top_k) + " is negative");
  if (!(top_p > 0 && top_p <= 1)) refuse("top_p: " + shown(top_p) + " is not in (0, 1]");
}

int32_t sample(std::span<const float> logits_V, const SamplingParams& params, int64_t position) {
  const auto likeliest = std::max_element(logits_V.begin(), logits_V.end());
  if (params.temperature == 0) return static_cast<int32_t>(likeliest - logits_V.begin());

  std::vector<Candidate> candidates(logits_V.size());
  for (size_t i = 0; i < logits_V.size(); ++i) {
    const double scaled = (static_cast<double>(logits_V[i]) - *likeliest) / params.temperature;
    candidates[i] = {static_cast<int32_t>(i), std::exp(scaled)};
  }
  if (params.top_k > 0) candidates = keep_top_k(std::move(candidates), params.top_k);
  if (params.top_p < 1) candidates = keep_top_p(std::move(candidates), params.top_p);

  double rest = uniform(params.seed, position) * sum(candidates);
  for (const Candidate& candidate : candidates) {
    rest -= candidate.weight;
    if (rest < 0) return candidate.token;
  }
  return static_cast<int32_t>(likeliest - logits_V.begin());  // rounding left a crumb
}

}  // namespace coterie
