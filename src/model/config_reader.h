// Typed access to the keys of one JSON object of a configuration file. Every failure is an
// InvalidArgument of one line, "FILE: field: what", where field is the whole path ("layers[3].top_k").
// The reader remembers which keys were asked for, so that leftovers can be refused.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

namespace coterie {

using Json = nlohmann::ordered_json;  // for writing: keys stay in the order in which they were set

class ConfigReader {
 public:
  // object must outlive the reader; prefix is the object's own path, ending in '.', or empty.
  ConfigReader(const nlohmann::json& object, std::string source, std::string prefix = "");

  bool present(const std::string& key) const;  // there, perhaps as null
  bool has(const std::string& key) const;      // there and not null

  // The two-argument forms give the fallback for a key that is absent or null.
  int64_t integer(const std::string& key) const;
  int64_t integer(const std::string& key, int64_t fallback) const;
  double number(const std::string& key, double fallback) const;
  bool boolean(const std::string& key, bool fallback) const;
  std::string text(const std::string& key) const;
  std::string text(const std::string& key, const std::string& fallback) const;
  std::vector<int64_t> integers(const std::string& key) const;  // a list; empty when absent or null
  std::vector<double> numbers(const std::string& key) const;    // likewise
  const nlohmann::json& value(const std::string& key) const;    // InvalidArgument when absent or null
  ConfigReader object(const std::string& key) const;

  // Refuses the first key that nobody asked for: "FILE: key: unknown key".
  void refuse_unknown(const std::string& what = "unknown key") const;
  void ignore(const std::string& key) const;

  [[noreturn]] void fail(const std::string& key, const std::string& what) const;
  const std::string& source() const { return source_; }

 private:
  const nlohmann::json& object_;
  std::string source_;
  std::string prefix_;
  mutable std::set<std::string> asked_;
};

// A float as the shortest decimal that reads back as the same float: 1e-05, not 9.99999974e-06.
double shortest_decimal(float value);

}  // namespace coterie
