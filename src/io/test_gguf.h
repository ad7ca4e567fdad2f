// GGUF files for tests, put together from their parts; any part may be wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace coterie::gguf_file {

// Type numbers of metadata values.
inline constexpr uint32_t kUint8 = 0, kInt8 = 1, kUint16 = 2, kInt16 = 3, kUint32 = 4, kInt32 = 5, kFloat32 = 6,
                          kBool = 7, kString = 8, kArray = 9, kUint64 = 10, kInt64 = 11, kFloat64 = 12;
inline constexpr uint32_t kF32 = 0, kQ4_0 = 2, kQ8_0 = 8, kQ4_K = 12, kIq2Xs = 17, kMxfp4 = 39;  // and of tensors

template <typename T>
std::string le(T value) {  // little endian
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

inline std::string str(const std::string& text) { return le(uint64_t{text.size()}) + text; }

template <typename T>
std::string value(const std::string& key, uint32_t type, T payload) {
  return str(key) + le(type) + le(payload);
}

inline std::string text_value(const std::string& key, const std::string& text) {
  return str(key) + le(kString) + str(text);
}

inline std::string tensor(const std::string& name, const std::vector<uint64_t>& innermost_first, uint32_t type,
                          uint64_t offset) {
  std::string out = str(name) + le(static_cast<uint32_t>(innermost_first.size()));
  for (const uint64_t dim : innermost_first) out += le(dim);
  return out + le(type) + le(offset);
}

// A whole file from its parts.
struct Parts {
  std::vector<std::string> values, tensors;
  std::string data;
  uint32_t version = 3;
  size_t alignment = 32;

  std::string bytes() const {
    std::string out = "GGUF" + le(version) + le(uint64_t{tensors.size()}) + le(uint64_t{values.size()});
    for (const std::string& part : values) out += part;
    for (const std::string& part : tensors) out += part;
    out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data;
  }
};

}  // namespace coterie::gguf_file
