// JSON from outside, read strictly: one value, bounded nesting, no key twice in one object (parsers
// differ in which one they keep, so two readers would see two files).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace coterie {

// CorruptFile "SOURCE: invalid JSON at byte N" (or what else is wrong); source begins the message.
nlohmann::json parse_json(std::string_view text, const std::string& source, int max_depth = 64);

}  // namespace coterie
