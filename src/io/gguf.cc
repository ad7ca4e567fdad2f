#include "io/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <optional>
#include <span>
#include <unordered_map>

#include "base/memory.h"
#include "coterie/error.h"
#include "io/ggml_type.h"
#include "io/mxfp4.h"
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

struct Placement {
  const GgmlType* type = nullptr;
  uint64_t offset = 0;  // from the start of the data
};

// A tensor's entry in the list that precedes the data.
struct TensorInfo {
  StoredTensor tensor;
  Placement placement;
};

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

TensorInfo take_tensor_info(Cursor& cursor, uint64_t alignment) {
  TensorInfo info;
  info.tensor.name = cursor.take_string();
  cursor.field = "tensor " + printable(info.tensor.name);
  take_shape(cursor, info.tensor);
  const auto type_id = cursor.take<uint32_t>();
  const GgmlType* type = find_ggml_type(type_id);
  if (!type) cursor.fail("type " + std::to_string(type_id) + " is not known");
  info.tensor.dtype = type->name;
  info.tensor.has_codes = info.tensor.dtype == "MXFP4";
  set_bytes(cursor, *type, info.tensor);
  info.placement = {type, cursor.take<uint64_t>()};
  if (info.placement.offset % alignment != 0) {
    cursor.fail("offset " + std::to_string(info.placement.offset) + " is not a multiple of the alignment " +
                std::to_string(alignment));
  }
  return info;
}

}  // namespace

struct GgufSource::State {
  explicit State(const std::string& path) : file(path) {
    Cursor cursor(file);
    take_header(cursor);
    const uint64_t alignment = data_alignment();
    for (uint64_t i = 0; i < num_tensors; ++i) {
      cursor.field = "tensor " + std::to_string(i);
      add(cursor, take_tensor_info(cursor, alignment));
    }
    const size_t unpadded = cursor.position();
    data_start = (unpadded + alignment - 1) / alignment * alignment;
    check_ranges();
  }

  MappedFile file;
  std::vector<std::pair<std::string, GgufValue>> metadata;
  std::unordered_map<std::string, size_t> metadata_index;
  std::vector<StoredTensor> tensors;
  std::vector<Placement> placements;  // of each tensor
  std::unordered_map<std::string, size_t> tensor_index;
  uint64_t num_tensors = 0;
  size_t data_start = 0;

  // Magic, version, the two counts, and the metadata.
  void take_header(Cursor& cursor) {
    const auto magic = cursor.take<uint32_t>();
    if (magic != 0x46554747) cursor.fail("does not begin with 'GGUF'");  // little endian
    const auto version = cursor.take<uint32_t>();
    if (version != 0 && (version & 0xffff) == 0) cursor.fail("big-endian files are not supported");
    if (version != 2 && version != 3) cursor.fail("version " + std::to_string(version) + " is not 2 or 3");
    // Name length, number of dimensions, type, offset; key length, type, value.
    num_tensors = cursor.take_count("tensors", 8 + 4 + 4 + 8);
    const uint64_t num_values = cursor.take_count("metadata values", 8 + 4 + 1);
    for (uint64_t i = 0; i < num_values; ++i) {
      cursor.field = "metadata " + std::to_string(i);
      std::string key = cursor.take_string();
      cursor.field = "metadata " + printable(key);
      if (!metadata_index.emplace(key, metadata.size()).second) cursor.fail("occurs twice");
      GgufValue value = take_value(cursor);
      metadata.emplace_back(std::move(key), std::move(value));
    }
  }

  uint64_t data_alignment() const {
    const auto found = metadata_index.find("general.alignment");
    if (found == metadata_index.end()) return kDefaultAlignment;
    const auto* value = std::get_if<int64_t>(&metadata[found->second].second);
    if (!value || *value < 1 || *value > INT32_MAX || !std::has_single_bit(static_cast<uint64_t>(*value))) {
      throw CorruptFile(file.path() + ": metadata 'general.alignment': " +
                        (value ? std::to_string(*value) : "the value") + " is not a power of two below 2^31");
    }
    return static_cast<uint64_t>(*value);
  }

  void add(const Cursor& cursor, TensorInfo info) {
    if (!tensor_index.emplace(info.tensor.name, tensors.size()).second) cursor.fail("occurs twice");
    tensors.push_back(std::move(info.tensor));
    placements.push_back(info.placement);
  }

  // Every tensor lies in the file and none shares bytes with another.
  void check_ranges() const {
    std::vector<size_t> order(tensors.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return std::pair(placements[a].offset, tensors[a].bytes) < std::pair(placements[b].offset, tensors[b].bytes);
    });
    const uint64_t available = file.bytes().size() - std::min(data_start, file.bytes().size());
    uint64_t previous_end = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      const StoredTensor& tensor = tensors[order[i]];
      const uint64_t offset = placements[order[i]].offset;
      const std::string where = file.path() + ": tensor " + printable(tensor.name) + ": ";
      if (offset > available || tensor.bytes > available - offset) {
        throw CorruptFile(where + std::to_string(tensor.bytes) + " bytes at offset " + std::to_string(offset) +
                          " exceed the " + std::to_string(available) + " bytes of data");
      }
      if (offset < previous_end) {
        throw CorruptFile(where + "offset " + std::to_string(offset) + " lies in tensor " +
                          printable(tensors[order[i - 1]].name));
      }
      previous_end = offset + tensor.bytes;
    }
  }
};

GgufSource::GgufSource(const std::string& path) : state_(std::make_unique<State>(path)) {}
GgufSource::~GgufSource() = default;

const std::string& GgufSource::path() const { return state_->file.path(); }
const std::vector<StoredTensor>& GgufSource::tensors() const { return state_->tensors; }
const std::vector<std::pair<std::string, GgufValue>>& GgufSource::metadata() const { return state_->metadata; }

const StoredTensor* GgufSource::find(const std::string& name) const {
  const auto found = state_->tensor_index.find(name);
  return found == state_->tensor_index.end() ? nullptr : &state_->tensors[found->second];
}

const GgufValue* GgufSource::find_metadata(const std::string& key) const {
  const auto found = state_->metadata_index.find(key);
  return found == state_->metadata_index.end() ? nullptr : &state_->metadata[found->second].second;
}

void GgufSource::read(const std::string& name, float* out) const {
  const auto found = state_->tensor_index.find(name);
  if (found == state_->tensor_index.end()) throw InvalidArgument(path() + ": there is no tensor " + printable(name));
  const auto [type, offset] = state_->placements[found->second];
  if (!type->dequantize) {
    throw InvalidArgument(path() + ": tensor " + printable(name) + ": type: " + type->name +
                          " is not one of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, MXFP4");
  }
  const std::byte* blocks = state_->file.bytes().data() + state_->data_start + offset;
  const int64_t num_elements = state_->tensors[found->second].num_elements();
  type->dequantize(blocks, num_elements / type->block_elements, out);
}

// ggml keeps scale and codes together, and halves of a block in the nibbles of a byte.
std::optional<CodedTensor> GgufSource::codes(const std::string& name) const {
  const StoredTensor* stored = find(name);
  if (!stored || stored->dtype != "MXFP4") return std::nullopt;
  const auto [type, offset] = state_->placements[state_->tensor_index.at(name)];
  const std::byte* block = state_->file.bytes().data() + state_->data_start + offset;
  CodedTensor tensor{.rows = 0, .cols = stored->shape.back()};
  tensor.rows = tensor.cols == 0 ? 0 : stored->num_elements() / tensor.cols;
  const int64_t num_blocks = stored->num_elements() / kMxfp4Block;
  tensor.codes.reserve(static_cast<size_t>(num_blocks * kMxfp4Block / 2));
  for (int64_t b = 0; b < num_blocks; ++b, block += type->block_bytes) {
    tensor.scales.push_back(std::to_integer<uint8_t>(block[0]));
    const auto code = [&](int i) {
      const auto byte = std::to_integer<int>(block[1 + i % 16]);
      return i < 16 ? byte & 15 : byte >> 4;
    };
    for (int i = 0; i < kMxfp4Block; i += 2) tensor.codes.push_back(static_cast<uint8_t>(code(i) | code(i + 1) << 4));
  }
  return tensor;
}

}  // namespace coterie
