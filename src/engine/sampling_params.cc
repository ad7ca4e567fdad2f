// What values SamplingParams may have.
#include <charconv>
#include <cmath>
#include <limits>
#include <string>

#include "coterie/engine.h"
#include "coterie/error.h"

namespace coterie {
namespace {

std::string shown(float value) {
  char digits[32];
  return std::string(digits, std::to_chars(digits, digits + sizeof(digits), value).ptr);
}

void check_at_least(const char* field, int64_t value, int64_t least) {
  if (value < least)
    throw InvalidArgument(std::string(field) + ": " + std::to_string(value) + " is below " + std::to_string(least));
}

void check_that(bool good, const char* field, float value, const char* rule) {
  if (!good) throw InvalidArgument(std::string(field) + ": " + shown(value) + " is not " + rule);
}

}  // namespace

void SamplingParams::validate() const {
  check_at_least("n", n, 1);
  check_at_least("max_new_tokens", max_new_tokens, 1);
  check_at_least("min_tokens", min_tokens, 0);
  if (min_tokens > max_new_tokens) {
    throw InvalidArgument("min_tokens: " + std::to_string(min_tokens) + " exceeds max_new_tokens (" +
                          std::to_string(max_new_tokens) + ")");
  }
  check_that(temperature >= 0 && std::isfinite(temperature), "temperature", temperature, "zero or positive");
  if (top_k < 0) throw InvalidArgument("top_k: " + std::to_string(top_k) + " is negative");
  check_that(top_p > 0 && top_p <= 1, "top_p", top_p, "in (0, 1]");
  check_that(min_p >= 0 && min_p <= 1, "min_p", min_p, "in [0, 1]");
  check_that(repetition_penalty > 0 && std::isfinite(repetition_penalty), "repetition_penalty", repetition_penalty,
             "positive");
  check_that(std::isfinite(presence_penalty), "presence_penalty", presence_penalty, "a finite number");
  check_that(std::isfinite(frequency_penalty), "frequency_penalty", frequency_penalty, "a finite number");
  for (const auto& [token, bias] : logit_bias) {
    check_that(bias < std::numeric_limits<float>::infinity(), ("logit_bias[" + std::to_string(token) + "]").c_str(),
               bias, "a number below infinity");
  }
  check_at_least("logprobs", logprobs.value_or(0), 0);
  check_at_least("prompt_logprobs", prompt_logprobs.value_or(0), 0);
}

}  // namespace coterie
