// The metadata of a GGUF file, checked while it is read. Every failure is InvalidArgument "FILE: KEY: what".
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "coterie/error.h"
#include "io/gguf.h"
#include "io/printable.h"

namespace coterie {

// Keys are those of one architecture, without its name before them, or, beginning with '/', whole ones.
class GgufMetadata {
 public:
  GgufMetadata(const GgufSource& file, std::string architecture)
      : file_(file), prefix_(std::move(architecture) + ".") {}

  [[noreturn]] void fail(const std::string& key, const std::string& what) const {
    throw InvalidArgument(file_.path() + ": " + whole(key) + ": " + what);
  }

  std::optional<int64_t> integer(const std::string& key) const { return get<int64_t>(key, "a whole number"); }
  std::optional<bool> boolean(const std::string& key) const { return get<bool>(key, "true or false"); }
  std::optional<double> number(const std::string& key) const {
    const std::optional<double> value = get<double>(key, "a number");
    if (value && !std::isfinite(*value)) {
      fail(key, (std::isnan(*value) ? "nan" : std::to_string(*value)) + " is not finite");
    }
    return value;
  }
  std::optional<std::string> text(const std::string& key) const { return get<std::string>(key, "a string"); }
  // Empty where there is none.
  std::vector<int64_t> integers(const std::string& key) const {
    return get<std::vector<int64_t>>(key, "a list of whole numbers").value_or(std::vector<int64_t>());
  }
  std::vector<std::string> texts(const std::string& key) const {
    return get<std::vector<std::string>>(key, "a list of strings").value_or(std::vector<std::string>());
  }

  // Without what stands for no token.
  std::optional<int64_t> token_id(const std::string& key) const {
    const std::optional<int64_t> id = integer(key);
    return id && names_token(key, *id) ? id : std::nullopt;
  }
  std::vector<int64_t> token_ids(const std::string& key) const {
    std::vector<int64_t> ids = integers(key);
    std::erase_if(ids, [&](int64_t id) { return !names_token(key, id); });
    return ids;
  }

  int64_t required_integer(const std::string& key) const {
    const std::optional<int64_t> value = integer(key);
    if (!value) fail(key, "is missing");
    return *value;
  }

  // For a key that says what we do anyway.
  void only(const std::string& key, int64_t supported) const {
    const int64_t value = integer(key).value_or(supported);
    if (value == supported) return;
    fail(key, std::to_string(value) + " is not supported (" + std::to_string(supported) + " is)");
  }
  void ignore(const std::string& key) const { asked_.insert(whole(key)); }

  // The first key of the architecture that nobody asked for.
  void refuse_unknown() const {
    for (const auto& [key, value] : file_.metadata()) {
      if (key.starts_with(prefix_) && !asked_.contains(key)) {
        throw InvalidArgument(file_.path() + ": " + printable(key) + ": is not supported");
      }
    }
  }

 private:
  std::string whole(const std::string& key) const { return key[0] == '/' ? key.substr(1) : prefix_ + key; }

  // llama.cpp's id of no token is -1, which its files have as an unsigned number.
  bool names_token(const std::string& key, int64_t id) const {
    if (id == -1 || id == std::numeric_limits<uint32_t>::max()) return false;
    if (id < 0) fail(key, std::to_string(id) + " is no token");
    return true;
  }

  template <typename T>
  std::optional<T> get(const std::string& key, const char* type) const {
    asked_.insert(whole(key));
    const GgufValue* value = file_.find_metadata(whole(key));
    if (!value) return std::nullopt;
    const T* typed = std::get_if<T>(value);
    if (!typed) fail(key, std::string("is not ") + type);
    return *typed;
  }

  const GgufSource& file_;
  std::string prefix_;
  mutable std::set<std::string> asked_;
};

}  // namespace coterie
