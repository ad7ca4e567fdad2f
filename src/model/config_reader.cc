#include "model/config_reader.h"

#include <charconv>
#include <cmath>
#include <utility>

#include "coterie/error.h"

namespace coterie {
namespace {

// A value as a message shows it: short, on one line, whatever bytes the file holds.
std::string shown(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

}  // namespace

ConfigReader::ConfigReader(const nlohmann::json& object, std::string source, std::string prefix)
    : object_(object), source_(std::move(source)), prefix_(std::move(prefix)) {
  if (!object_.is_object()) {
    const std::string field = prefix_.empty() ? "" : prefix_.substr(0, prefix_.size() - 1) + ": ";
    throw InvalidArgument(source_ + ": " + field + shown(object_) + " is not an object");
  }
}

void ConfigReader::fail(const std::string& key, const std::string& what) const {
  std::string message = prefix_ + key + ": " + what;
  for (char& c : message) {
    if (c < 0x20 || c == 0x7f) c = '?';  // keys and strings come from outside: one line, plain ASCII
  }
  throw InvalidArgument(source_ + ": " + message);
}

bool ConfigReader::present(const std::string& key) const {
  asked_.insert(key);
  return object_.contains(key);
}

bool ConfigReader::has(const std::string& key) const { return present(key) && !object_.at(key).is_null(); }

const nlohmann::json& ConfigReader::value(const std::string& key) const {
  if (!has(key)) fail(key, "missing");
  return object_.at(key);
}

int64_t ConfigReader::integer(const std::string& key) const {
  const nlohmann::json& v = value(key);
  const bool fits = v.is_number_integer() && (!v.is_number_unsigned() || v.get<uint64_t>() <= INT64_MAX);
  if (!fits) fail(key, shown(v) + " is not an integer");
  return v.get<int64_t>();
}

int64_t ConfigReader::integer(const std::string& key, int64_t fallback) const {
  return has(key) ? integer(key) : fallback;
}

double ConfigReader::number(const std::string& key, double fallback) const {
  if (!has(key)) return fallback;
  const nlohmann::json& v = value(key);
  if (!v.is_number() || !std::isfinite(v.get<double>())) fail(key, shown(v) + " is not a number");
  return v.get<double>();
}

bool ConfigReader::boolean(const std::string& key, bool fallback) const {
  if (!has(key)) return fallback;
  const nlohmann::json& v = value(key);
  if (!v.is_boolean()) fail(key, shown(v) + " is not true or false");
  return v.get<bool>();
}

std::string ConfigReader::text(const std::string& key) const {
  const nlohmann::json& v = value(key);
  if (!v.is_string()) fail(key, shown(v) + " is not a string");
  return v.get<std::string>();
}

std::string ConfigReader::text(const std::string& key, const std::string& fallback) const {
  return has(key) ? text(key) : fallback;
}

std::vector<int64_t> ConfigReader::integers(const std::string& key) const {
  std::vector<int64_t> result;
  if (!has(key)) return result;
  const nlohmann::json& list = value(key);
  if (!list.is_array()) fail(key, shown(list) + " is not a list");
  for (const nlohmann::json& v : list) {
    if (!v.is_number_integer()) fail(key, shown(v) + " is not an integer");
    result.push_back(v.get<int64_t>());
  }
  return result;
}

std::vector<double> ConfigReader::numbers(const std::string& key) const {
  std::vector<double> result;
  if (!has(key)) return result;
  const nlohmann::json& list = value(key);
  if (!list.is_array()) fail(key, shown(list) + " is not a list");
  for (const nlohmann::json& v : list) {
    if (!v.is_number()) fail(key, shown(v) + " is not a number");
    result.push_back(v.get<double>());
  }
  return result;
}

ConfigReader ConfigReader::object(const std::string& key) const {
  return ConfigReader(value(key), source_, prefix_ + key + ".");
}

void ConfigReader::ignore(const std::string& key) const { asked_.insert(key); }

void ConfigReader::refuse_unknown(const std::string& what) const {
  for (const auto& item : object_.items()) {
    if (!asked_.contains(item.key())) fail(item.key(), what + " (" + shown(item.value()) + ")");
  }
}

double shortest_decimal(float value) {
  char digits[64];
  const auto written = std::to_chars(digits, digits + sizeof(digits), value);
  double result = 0;
  std::from_chars(digits, written.ptr, result);
  return result;
}

}  // namespace coterie
