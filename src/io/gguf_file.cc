#include "io/gguf_file.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <unordered_set>

#include "coterie/error.h"
#include "io/ggml_type.h"
#include "io/printable.h"

namespace coterie {
namespace {

constexpr uint32_t kMaxDims = 4;  // ggml's own limit
constexpr uint64_t kDefaultAlignment = 32;

// Types of metadata values, numbered as in the file.
enum class ValueType : uint32_t {
  kUint8 = 0,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

// Least bytes that one value takes in the file, so that a count can be held against the file's size
// before anything of that count is allocated. A string has at least its length.
std::optional<size_t> least_bytes(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
    case ValueType::kInt8:
    case ValueType::kBool:
      return 1;
    case ValueType::kUint16:
    case ValueType::kInt16:
      return 2;
    case ValueType::kUint32:
    case ValueType::kInt32:
    case ValueType::kFloat32:
      return 4;
    case ValueType::kString:
    case ValueType::kUint64:
    case ValueType::kInt64:
    case ValueType::kFloat64:
      return 8;
    case ValueType::kArray:
      return 12;
  }
  return std::nullopt;
}

// Walks the bytes from the file's start. `field` (what is being read) is named when they end early.
class Cursor {
 public:
  explicit Cursor(const MappedFile& file) : file_(file) {}

  std::string field = "header";

  size_t position() const { return position_; }

  [[noreturn]] void fail(const std::string& what) const {
    throw CorruptFile(file_.path() + ": " + field + ": " + what);
  }

  template <typename T>
  T take() {
    T value;
    std::memcpy(&value, take_bytes(sizeof(T)).data(), sizeof(T));
    return value;
  }

  std::string take_string() {
    const auto length = take<uint64_t>();
    if (length > remaining()) fail("a string of " + std::to_string(length) + past_the_end());
    const std::span<const std::byte> bytes = take_bytes(length);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  // A number of things that each take at least `bytes_each` bytes.
  uint64_t take_count(const char* things, size_t bytes_each) {
    const auto count = take<uint64_t>();
    if (count > remaining() / bytes_each) fail(std::to_string(count) + " " + things + past_the_end());
    return count;
  }

 private:
  size_t remaining() const { return file_.bytes().size() - position_; }

  std::string past_the_end() const {
    return " is more than the remaining " + std::to_string(remaining()) + " bytes hold";
  }

  std::span<const std::byte> take_bytes(size_t count) {
    if (count > remaining()) fail("the file ends here, at byte " + std::to_string(file_.bytes().size()));
    position_ += count;
    return file_.bytes().subspan(position_ - count, count);
  }

  const MappedFile& file_;
  size_t position_ = 0;
};

int64_t take_integer(Cursor& cursor, ValueType type) {
  switch (type) {
    case ValueType::kUint8:
      return cursor.take<uint8_t>();
    case ValueType::kInt8:
      return cursor.take<int8_t>();
    case ValueType::kUint16:
      return cursor.take<uint16_t>();
    case ValueType::kInt16:
      return cursor.take<int16_t>();
    case ValueType::kUint32:
      return cursor.take<uint32_t>();
    case ValueType::kInt32:
      return cursor.take<int32_t>();
    case ValueType::kInt64:
      return cursor.take<int64_t>();
    case ValueType::kBool: {
      const auto value = cursor.take<uint8_t>();
      if (value > 1) cursor.fail("bool " + std::to_string(value) + " is not 0 or 1");
      return value;
    }
    default: {
      const auto value = cursor.take<uint64_t>();
      if (value > uint64_t{INT64_MAX}) cursor.fail(std::to_string(value) + " exceeds 2^63 - 1");
      return static_cast<int64_t>(value);
    }
  }
}

double take_float(Cursor& cursor, ValueType type) {
  return type == ValueType::kFloat32 ? double{cursor.take<float>()} : cursor.take<double>();
}

bool is_float(ValueType type) { return type == ValueType::kFloat32 || type == ValueType::kFloat64; }

ValueType take_type(Cursor& cursor) {
  const auto type = static_cast<ValueType>(cursor.take<uint32_t>());
  if (!least_bytes(type)) cursor.fail("type " + std::to_string(static_cast<uint32_t>(type)) + " is not known");
  return type;
}

template <typename T, typename Take>
std::vector<T> take_list(uint64_t count, Take take) {
  std::vector<T> values;
  values.reserve(count);
  for (uint64_t i = 0; i < count; ++i) values.push_back(take());
  return values;
}

GgufValue take_array(Cursor& cursor) {
  const ValueType type = take_type(cursor);
  if (type == ValueType::kArray) cursor.fail("arrays of arrays are not supported");
  const uint64_t count = cursor.take_count("array elements", *least_bytes(type));
  if (type == ValueType::kString) return take_list<std::string>(count, [&] { return cursor.take_string(); });
  if (is_float(type)) return take_list<double>(count, [&] { return take_float(cursor, type); });
  return take_list<int64_t>(count, [&] { return take_integer(cursor, type); });
}

GgufValue take_value(Cursor& cursor) {
  const ValueType type = take_type(cursor);
  if (type == ValueType::kArray) return take_array(cursor);
  if (type == ValueType::kString) return cursor.take_string();
  if (type == ValueType::kBool) return take_integer(cursor, type) != 0;
  if (is_float(type)) return take_float(cursor, type);
  return take_integer(cursor, type);
}

// Outermost first; the file has it innermost first.
void take_shape(Cursor& cursor, StoredTensor& tensor) {
  const auto num_dims = cursor.take<uint32_t>();
  if (num_dims > kMaxDims) cursor.fail(std::to_string(num_dims) + " dimensions exceed " + std::to_string(kMaxDims));
  for (uint32_t i = 0; i < num_dims; ++i) {
    tensor.shape.insert(tensor.shape.begin(), take_integer(cursor, ValueType::kUint64));
  }
  if (!checked_num_elements(tensor.shape)) cursor.fail("product of the shape exceeds 2^63 - 1");
}

void set_bytes(const Cursor& cursor, const GgmlType& type, StoredTensor& tensor) {
  const int64_t innermost = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (innermost % type.block_elements != 0) {
    cursor.fail("innermost dimension " + std::to_string(innermost) + " is not a multiple of the " +
                std::to_string(type.block_elements) + " elements in a block of " + type.name);
  }
  const auto num_blocks = static_cast<size_t>(tensor.num_elements() / type.block_elements);
  if (__builtin_mul_overflow(num_blocks, type.block_bytes, &tensor.bytes)) {
    cursor.fail("number of bytes exceeds 2^64 - 1");
  }
}

GgufTensor take_tensor(Cursor& cursor, uint64_t alignment) {
  GgufTensor info;
  info.stored.name = cursor.take_string();
  cursor.field = "tensor " + printable(info.stored.name);
  take_shape(cursor, info.stored);
  const auto type_id = cursor.take<uint32_t>();
  const GgmlType* type = find_ggml_type(type_id);
  if (!type) cursor.fail("type " + std::to_string(type_id) + " is not known");
  info.stored.dtype = type->name;
  info.stored.has_codes = info.stored.dtype == "MXFP4";
  set_bytes(cursor, *type, info.stored);
  info.type = type;
  info.offset = cursor.take<uint64_t>();
  if (info.offset % alignment != 0) {
    cursor.fail("offset " + std::to_string(info.offset) + " is not a multiple of the alignment " +
                std::to_string(alignment));
  }
  return info;
}

// Magic, version, the metadata; returns the number of tensors.
uint64_t take_header(Cursor& cursor, std::vector<std::pair<std::string, GgufValue>>& metadata) {
  const auto magic = cursor.take<uint32_t>();
  if (magic != 0x46554747) cursor.fail("does not begin with 'GGUF'");  // little endian
  const auto version = cursor.take<uint32_t>();
  if (version != 0 && (version & 0xffff) == 0) cursor.fail("big-endian files are not supported");
  if (version != 2 && version != 3) cursor.fail("version " + std::to_string(version) + " is not 2 or 3");
  // Name length, number of dimensions, type, offset; key length, type, value.
  const uint64_t num_tensors = cursor.take_count("tensors", 8 + 4 + 4 + 8);
  const uint64_t num_values = cursor.take_count("metadata values", 8 + 4 + 1);
  std::unordered_set<std::string> keys;
  for (uint64_t i = 0; i < num_values; ++i) {
    cursor.field = "metadata " + std::to_string(i);
    std::string key = cursor.take_string();
    cursor.field = "metadata " + printable(key);
    if (!keys.insert(key).second) cursor.fail("occurs twice");
    GgufValue value = take_value(cursor);
    metadata.emplace_back(std::move(key), std::move(value));
  }
  return num_tensors;
}

uint64_t data_alignment(const GgufFile& file) {
  const GgufValue* found = file.find_metadata("general.alignment");
  if (!found) return kDefaultAlignment;
  const auto* value = std::get_if<int64_t>(found);
  if (!value || *value < 1 || *value > INT32_MAX || !std::has_single_bit(static_cast<uint64_t>(*value))) {
    throw CorruptFile(file.path() + ": metadata 'general.alignment': " +
                      (value ? std::to_string(*value) : "the value") + " is not a power of two below 2^31");
  }
  return static_cast<uint64_t>(*value);
}

// Every tensor lies in the file and none shares bytes with another.
void check_ranges(const GgufFile& file) {
  std::vector<const GgufTensor*> order;
  for (const GgufTensor& tensor : file.tensors) order.push_back(&tensor);
  std::ranges::sort(order, {}, [](const GgufTensor* t) { return std::pair(t->offset, t->stored.bytes); });
  const uint64_t size = file.mapped.bytes().size(), available = size - std::min<uint64_t>(file.data_start, size);
  const GgufTensor* previous = nullptr;
  for (const GgufTensor* tensor : order) {
    const uint64_t offset = tensor->offset, bytes = tensor->stored.bytes;
    const std::string where = file.path() + ": tensor " + printable(tensor->stored.name) + ": ";
    if (offset > available || bytes > available - offset) {
      throw CorruptFile(where + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " exceed the " +
                        std::to_string(available) + " bytes of data");
    }
    if (previous && offset < previous->offset + previous->stored.bytes) {
      throw CorruptFile(where + "offset " + std::to_string(offset) + " lies in tensor " +
                        printable(previous->stored.name));
    }
    previous = tensor;
  }
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : mapped(path) {
  Cursor cursor(mapped);
  const uint64_t num_tensors = take_header(cursor, metadata);
  const uint64_t alignment = data_alignment(*this);
  std::unordered_set<std::string> names;
  for (uint64_t i = 0; i < num_tensors; ++i) {
    cursor.field = "tensor " + std::to_string(i);
    tensors.push_back(take_tensor(cursor, alignment));
    if (!names.insert(tensors.back().stored.name).second) cursor.fail("occurs twice");
  }
  data_start = (cursor.position() + alignment - 1) / alignment * alignment;
  check_ranges(*this);
}

const GgufValue* GgufFile::find_metadata(const std::string& key) const {
  const auto found = std::ranges::find(metadata, key, &std::pair<std::string, GgufValue>::first);
  return found == metadata.end() ? nullptr : &found->second;
}

}  // namespace coterie
