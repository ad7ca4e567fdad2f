// Strings from outside, in quotes and made fit for a one-line message: printable ASCII only, cut when long.
#pragma once

#include <string>
#include <string_view>

namespace coterie {

inline std::string printable(std::string_view text) {
  constexpr size_t kMaxLength = 120;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kMaxLength)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kMaxLength ? "...'" : "'");
}

}  // namespace coterie
