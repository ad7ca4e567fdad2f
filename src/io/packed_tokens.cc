#include "io/packed_tokens.h"

#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "coterie/error.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "io/printable.h"

namespace coterie {
namespace {

using nlohmann::json;

std::string path_in(const std::string& directory, const std::string& name) {
  return (std::filesystem::path(directory) / name).string();
}

std::string bin_path(const std::string& directory, const std::string& split) {
  if (split != "train" && split != "valid") {
    throw InvalidArgument("split: " + printable(split) + " is not 'train' or 'valid'");
  }
  return path_in(directory, split + ".bin");
}

// Fields of meta.json, whole numbers within [least, most].
class Meta {
 public:
  explicit Meta(const std::string& path) : path_(path), root_(parse_json(read_text_file(path), path)) {}

  int64_t number(const std::string& field, int64_t least, int64_t most) const {
    return number(root_, "", field, least, most);
  }

  int64_t number(const std::string& section, const std::string& field, int64_t least, int64_t most) const {
    return number(member(root_, "", section), section + ".", field, least, most);
  }

  std::string text(const std::string& field) const {
    const json& value = member(root_, "", field);
    if (!value.is_string()) fail(field, "is not a string");
    return value.get<std::string>();
  }

  [[noreturn]] void fail(const std::string& field, const std::string& what) const {
    throw CorruptFile(path_ + ": " + field + ": " + what);
  }

 private:
  const json& member(const json& object, const std::string& prefix, const std::string& field) const {
    const auto found = object.is_object() ? object.find(field) : object.end();
    if (found == object.end()) fail(prefix + field, "is missing");
    return *found;
  }

  int64_t number(const json& object, const std::string& prefix, const std::string& field, int64_t least,
                 int64_t most) const {
    const json& value = member(object, prefix, field);
    const bool whole = value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(most);
    if (!whole || value.get<int64_t>() < least) {
      fail(prefix + field, printable(value.dump(-1, ' ', true)) + " is not a whole number of " + std::to_string(least) +
                               " to " + std::to_string(most));
    }
    return value.get<int64_t>();
  }

  const std::string path_;
  const json root_;
};

}  // namespace

PackedTokens::PackedTokens(const std::string& directory, const std::string& split) : file_(bin_path(directory, split)) {
  const Meta meta(path_in(directory, "meta.json"));
  meta.number("format", 1, 1);
  const std::string dtype = meta.text("dtype");
  if (dtype != "uint16" && dtype != "uint32") meta.fail("dtype", printable(dtype) + " is not 'uint16' or 'uint32'");
  token_bytes_ = dtype == "uint16" ? 2 : 4;
  vocab_size_ = meta.number("vocab_size", 1, INT32_MAX);
  eos_token_id_ = meta.number("eos_token_id", 0, vocab_size_ - 1);
  num_tokens_ = meta.number(split, "tokens", 0, INT64_MAX / 4);
  num_bytes_ = meta.number(split, "bytes", 0, INT64_MAX);
  if (const size_t expected = static_cast<size_t>(num_tokens_) * token_bytes_; file_.bytes().size() != expected) {
    throw CorruptFile(path() + ": " + std::to_string(file_.bytes().size()) + " bytes, but " + split +
                      ".tokens of meta.json (" + std::to_string(num_tokens_) + ", " + dtype + ") needs " +
                      std::to_string(expected));
  }
}

int32_t PackedTokens::operator[](int64_t i) const {
  const std::byte* source = file_.bytes().data() + static_cast<size_t>(i) * token_bytes_;
  uint32_t token = 0;  // little-endian, like every machine that the kernels know
  std::memcpy(&token, source, token_bytes_);
  return static_cast<int32_t>(token);
}

void PackedTokens::copy(int64_t first, int64_t count, int32_t* out) const {
  COTERIE_CHECK(first >= 0 && count >= 0 && first <= num_tokens_ - count, "range outside the split");
  for (int64_t i = 0; i < count; ++i) {
    const int32_t token = (*this)[first + i];
    if (token < 0 || token >= vocab_size_) {
      throw CorruptFile(path() + ": token " + std::to_string(first + i) + ": id " +
                        std::to_string(static_cast<uint32_t>(token)) + " is not below vocab_size " +
                        std::to_string(vocab_size_));
    }
    out[i] = token;
  }
}

}  // namespace coterie
