#include "io/safetensors.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>

#include "base/memory.h"
#include "coterie/error.h"
#include "io/json.h"
#include "io/printable.h"

namespace coterie {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int kMaxJsonDepth = 4;                   // file -> tensor -> shape is 3
constexpr char kFileName[] = "model.safetensors";
constexpr char kIndexName[] = "model.safetensors.index.json";

// Bits per element of every dtype that the format names.
std::optional<uint64_t> dtype_bits(const std::string& dtype) {
  static const std::unordered_map<std::string, uint64_t> bits = {
      {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
      {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
      {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
      {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
  const auto found = bits.find(dtype);
  return found == bits.end() ? std::nullopt : std::optional(found->second);
}

// A tensor of one file with its bytes [begin, end) in the file's data.
struct Entry {
  StoredTensor tensor;
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Reads the fields of one tensor; `where` begins every message ("FILE: tensor 'NAME'").
class EntryReader {
 public:
  EntryReader(const json& fields, std::string where) : fields_(fields), where_(std::move(where)) {}

  Entry read(const std::string& name) const {
    if (!fields_.is_object()) fail("", "is not an object");
    Entry entry;
    entry.tensor.name = name;
    entry.tensor.dtype = dtype();
    for (const json& value : array("shape")) entry.tensor.shape.push_back(static_cast<int64_t>(number("shape", value)));
    const json& offsets = array("data_offsets");
    if (offsets.size() != 2) fail("data_offsets", std::to_string(offsets.size()) + " numbers, not 2");
    entry.begin = number("data_offsets", offsets[0]);
    entry.end = number("data_offsets", offsets[1]);
    if (entry.begin > entry.end) {
      fail("data_offsets", "begins at " + std::to_string(entry.begin) + ", after its end " + std::to_string(entry.end));
    }
    entry.tensor.bytes = entry.end - entry.begin;
    if (const uint64_t expected = byte_count(entry.tensor); expected != entry.tensor.bytes) {
      fail("data_offsets", "span " + std::to_string(entry.tensor.bytes) + " bytes, but shape and dtype need " +
                               std::to_string(expected));
    }
    return entry;
  }

 private:
  [[noreturn]] void fail(const std::string& field, const std::string& what) const {
    throw CorruptFile(where_ + (field.empty() ? " " : ": " + field + ": ") + what);
  }

  const json& member(const char* field) const {
    const auto found = fields_.find(field);
    if (found == fields_.end()) fail(field, "is missing");
    return *found;
  }

  std::string dtype() const {
    const json& value = member("dtype");
    if (!value.is_string()) fail("dtype", "is not a string");
    auto text = value.get<std::string>();
    if (!dtype_bits(text)) fail("dtype", printable(text) + " is not known");
    return text;
  }

  const json& array(const char* field) const {
    const json& value = member(field);
    if (!value.is_array()) fail(field, "is not an array");
    return value;
  }

  // Non-negative and within int64.
  uint64_t number(const char* field, const json& value) const {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t{INT64_MAX}) {
      fail(field, "holds " + printable(value.dump(-1, ' ', true)) + ", not a whole number of 0 to 2^63 - 1");
    }
    return value.get<uint64_t>();
  }

  uint64_t byte_count(const StoredTensor& tensor) const {
    const std::optional<int64_t> elements = checked_num_elements(tensor.shape);
    if (!elements) fail("shape", "product exceeds 2^63 - 1");
    uint64_t bits = 0;
    if (__builtin_mul_overflow(static_cast<uint64_t>(*elements), *dtype_bits(tensor.dtype), &bits)) {
      fail("shape", "number of bits exceeds 2^64 - 1");
    }
    if (bits % 8 != 0) fail("shape", std::to_string(bits) + " bits are not whole bytes");
    return bits / 8;
  }

  const json& fields_;
  const std::string where_;
};

// One mapped file: its entries in file order, where the data starts, and __metadata__.
struct ParsedFile {
  explicit ParsedFile(const std::string& path) : file(path) {
    const json header = parse_header();
    for (const auto& [name, fields] : header.items()) {
      if (name == "__metadata__") {
        read_metadata(fields);
      } else {
        entries.push_back(EntryReader(fields, file.path() + ": tensor " + printable(name)).read(name));
      }
    }
    check_cover();
  }

  MappedFile file;
  size_t data_start = 0;
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

 private:
  json parse_header() {
    const std::span<const std::byte> bytes = file.bytes();
    uint64_t length = 0;
    if (bytes.size() < sizeof(length)) {
      throw CorruptFile(file.path() + ": " + std::to_string(bytes.size()) + " bytes, too short for a header length");
    }
    std::memcpy(&length, bytes.data(), sizeof(length));
    const std::string where = file.path() + ": header";
    if (length > kMaxHeaderBytes) {
      throw CorruptFile(where + ": length " + std::to_string(length) + " exceeds " + std::to_string(kMaxHeaderBytes));
    }
    if (length > bytes.size() - sizeof(length)) {
      throw CorruptFile(where + ": length " + std::to_string(length) + " exceeds the file of " +
                        std::to_string(bytes.size()) + " bytes");
    }
    data_start = sizeof(length) + length;
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + sizeof(length), length);
    if (!text.starts_with('{')) throw CorruptFile(where + ": does not begin with '{'");
    return parse_json(text, where, kMaxJsonDepth);
  }

  void read_metadata(const json& fields) {
    const std::string where = file.path() + ": __metadata__";
    if (!fields.is_object()) throw CorruptFile(where + " is not an object");
    for (const auto& [key, value] : fields.items()) {
      if (!value.is_string()) throw CorruptFile(where + ": " + printable(key) + " is not a string");
      metadata[key] = value.get<std::string>();
    }
  }

  // In file order every range begins where the one before ends, and the last ends with the file.
  void check_cover() {
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
    uint64_t covered = 0;
    for (const Entry& entry : entries) {
      if (entry.begin != covered) {
        throw CorruptFile(file.path() + ": tensor " + printable(entry.tensor.name) + ": data_offsets: begins at " +
                          std::to_string(entry.begin) + (entry.begin < covered ? ", an overlap" : ", a hole") +
                          ": the bytes before end at " + std::to_string(covered));
      }
      covered = entry.end;
    }
    if (const uint64_t available = file.bytes().size() - data_start; covered != available) {
      throw CorruptFile(file.path() + ": tensors cover " + std::to_string(covered) + " bytes, but the file holds " +
                        std::to_string(available));
    }
  }
};

// weight_map of an index: tensor -> shard.
std::map<std::string, std::string> read_index(const std::string& path) {
  const MappedFile file(path);
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() > kMaxHeaderBytes) {
    throw CorruptFile(path + ": " + std::to_string(bytes.size()) + " bytes exceed " + std::to_string(kMaxHeaderBytes));
  }
  const json index = parse_json({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path);
  const auto weight_map = index.is_object() ? index.find("weight_map") : index.end();
  if (weight_map == index.end() || !weight_map->is_object()) throw CorruptFile(path + ": weight_map: not an object");
  std::map<std::string, std::string> shard_of;
  for (const auto& [name, value] : weight_map->items()) {
    const std::string where = path + ": weight_map: " + printable(name) + ": ";
    if (!value.is_string()) throw CorruptFile(where + "is not a string");
    const auto shard = value.get<std::string>();
    // A name with a directory in it could reach any file of the machine.
    if (shard.empty() || shard == "." || shard == ".." || shard.find_first_of(std::string("/\\\0", 3)) != shard.npos) {
      throw CorruptFile(where + printable(shard) + " is not a plain file name");
    }
    shard_of[name] = shard;
  }
  if (shard_of.empty()) throw CorruptFile(path + ": weight_map: is empty");
  return shard_of;
}

std::string resolve(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;  // what cannot be examined is not a directory: opening it says why
  if (!fs::is_directory(path, ignored)) return path;
  for (const char* name : {kFileName, kIndexName}) {
    if (const fs::path candidate = fs::path(path) / name; fs::exists(candidate, ignored)) return candidate.string();
  }
  throw InvalidArgument(path + ": holds neither " + kFileName + " nor " + kIndexName);
}

}  // namespace

std::optional<DType> readable_dtype(const std::string& name) {
  if (name == "F32") return DType::kF32;
  if (name == "BF16") return DType::kBF16;
  if (name == "F16") return DType::kF16;
  return std::nullopt;
}

struct SafetensorsSource::State {
  struct Location {
    size_t index = 0;  // in `tensors`
    std::span<const std::byte> bytes;
  };

  std::string path;
  std::vector<MappedFile> files;
  std::vector<StoredTensor> tensors;
  std::unordered_map<std::string, Location> locations;
  std::map<std::string, std::string> metadata;

  void add(ParsedFile parsed) {
    const std::span<const std::byte> data = parsed.file.bytes().subspan(parsed.data_start);
    if (files.empty()) metadata = std::move(parsed.metadata);
    for (Entry& entry : parsed.entries) {
      locations[entry.tensor.name] = {tensors.size(), data.subspan(entry.begin, entry.end - entry.begin)};
      tensors.push_back(std::move(entry.tensor));
    }
    files.push_back(std::move(parsed.file));
  }

  void add_shards(const std::map<std::string, std::string>& shard_of) {
    std::set<std::string> shards;
    for (const auto& [name, shard] : shard_of) shards.insert(shard);
    for (const std::string& shard : shards) {
      const std::filesystem::path shard_path = std::filesystem::path(path).parent_path() / shard;
      if (!std::filesystem::exists(shard_path)) {
        throw CorruptFile(path + ": weight_map: shard " + printable(shard) + " is missing");
      }
      ParsedFile parsed(shard_path.string());
      for (const Entry& entry : parsed.entries) check_listed(entry.tensor.name, shard, shard_of);
      add(std::move(parsed));
    }
    for (const auto& [name, shard] : shard_of) {
      if (!locations.contains(name)) {
        throw CorruptFile(path + ": weight_map: " + printable(name) + " is not in its shard " + printable(shard));
      }
    }
  }

  void check_listed(const std::string& name, const std::string& shard,
                    const std::map<std::string, std::string>& shard_of) const {
    const auto listed = shard_of.find(name);
    if (listed != shard_of.end() && listed->second == shard) return;
    throw CorruptFile(path + ": weight_map: " + printable(name) + " is in shard " + printable(shard) + ", but listed " +
                      (listed == shard_of.end() ? "nowhere" : "in " + printable(listed->second)));
  }

  const Location& locate(const std::string& name) const {
    const auto found = locations.find(name);
    if (found == locations.end()) throw InvalidArgument(path + ": there is no tensor " + printable(name));
    return found->second;
  }
};

SafetensorsSource::SafetensorsSource(const std::string& path) : state_(std::make_unique<State>()) {
  state_->path = resolve(path);
  if (state_->path.ends_with(".json")) {
    state_->add_shards(read_index(state_->path));
  } else {
    state_->add(ParsedFile(state_->path));
  }
}

SafetensorsSource::~SafetensorsSource() = default;

const std::string& SafetensorsSource::path() const { return state_->path; }
const std::vector<StoredTensor>& SafetensorsSource::tensors() const { return state_->tensors; }
const std::map<std::string, std::string>& SafetensorsSource::metadata() const { return state_->metadata; }
std::span<const std::byte> SafetensorsSource::raw(const std::string& name) const { return state_->locate(name).bytes; }

std::vector<uint8_t> SafetensorsSource::bytes(const std::string& name) const {
  const std::span<const std::byte> there = raw(name);
  std::vector<uint8_t> copy(there.size());
  if (!there.empty()) std::memcpy(copy.data(), there.data(), there.size());
  return copy;
}

const StoredTensor* SafetensorsSource::find(const std::string& name) const {
  const auto found = state_->locations.find(name);
  return found == state_->locations.end() ? nullptr : &state_->tensors[found->second.index];
}

void SafetensorsSource::check_readable(const std::string& name) const {
  const StoredTensor& tensor = state_->tensors[state_->locate(name).index];
  if (readable_dtype(tensor.dtype)) return;
  throw InvalidArgument(state_->path + ": tensor " + printable(name) + ": dtype: " + tensor.dtype +
                        " is not one of F32, F16, BF16");
}

void SafetensorsSource::read(const std::string& name, float* out) const {
  check_readable(name);
  const State::Location& location = state_->locate(name);
  const StoredTensor& tensor = state_->tensors[location.index];
  convert_to_float(location.bytes.data(), *readable_dtype(tensor.dtype), out,
                   static_cast<size_t>(tensor.num_elements()));
}

}  // namespace coterie
