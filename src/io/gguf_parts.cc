#include "io/gguf_parts.h"

#include <charconv>
#include <optional>
#include <string_view>

namespace coterie {
namespace {

constexpr size_t kDigits = 5;
constexpr std::string_view kOf = "-of-", kExtension = ".gguf";
constexpr size_t kEnding = 1 + kDigits + kOf.size() + kDigits + kExtension.size();

std::optional<int> number_at(std::string_view text, size_t at) {
  int number = 0;
  const char* const first = text.data() + at;
  const auto [end, error] = std::from_chars(first, first + kDigits, number);
  if (error != std::errc() || end != first + kDigits || number < 1) return std::nullopt;
  return number;
}

std::string five_digits(int number) {
  const std::string text = std::to_string(number);
  return std::string(kDigits - text.size(), '0') + text;
}

}  // namespace

std::vector<std::string> gguf_parts(const std::string& path) {
  if (path.size() <= kEnding || !path.ends_with(kExtension)) return {path};
  const std::string_view ending = std::string_view(path).substr(path.size() - kEnding);
  if (ending[0] != '-' || ending.substr(1 + kDigits, kOf.size()) != kOf) return {path};
  const std::optional<int> number = number_at(ending, 1), count = number_at(ending, 1 + kDigits + kOf.size());
  if (!number || !count || *number > *count) return {path};
  std::vector<std::string> parts;
  const std::string stem = path.substr(0, path.size() - kEnding + 1);
  for (int i = 1; i <= *count; ++i) {
    parts.push_back(stem + five_digits(i) + std::string(kOf) + five_digits(*count) + std::string(kExtension));
  }
  return parts;
}

}  // namespace coterie
