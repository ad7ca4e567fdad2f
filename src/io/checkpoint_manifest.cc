#include "io/checkpoint_manifest.h"

#include <zlib.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "coterie/error.h"
#include "io/printable.h"
#include "io/safetensors.h"
#include "io/tensor_source.h"

namespace coterie {
namespace {

using nlohmann::json;

constexpr int64_t kFormat = 1;

// One object of the manifest; `where` begins every message.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) throw CorruptFile(where_ + ": is not an object");
  }

  [[noreturn]] void fail(const char* field, const std::string& what) const {
    throw CorruptFile(where_ + ": " + field + ": " + what);
  }

  bool has(const char* field) const { return object_.contains(field); }

  const json& get(const char* field) const {
    const auto found = object_.find(field);
    if (found == object_.end()) fail(field, "is missing");
    return *found;
  }

  const json& array(const char* field) const {
    const json& value = get(field);
    if (!value.is_array()) fail(field, "is not an array");
    return value;
  }

  std::string text(const char* field) const {
    const json& value = get(field);
    if (!value.is_string()) fail(field, "is not a string");
    return value.get<std::string>();
  }

  int64_t number(const char* field, int64_t least, int64_t most) const {
    return number(field, get(field), least, most);
  }

  int64_t number(const char* field, const json& value, int64_t least, int64_t most) const {
    const bool fits = value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(most) &&
                      value.get<int64_t>() >= least;
    if (!fits) {
      fail(field, printable(value.dump(-1, ' ', true)) + " is not a whole number of " + std::to_string(least) + " to " +
                      std::to_string(most));
    }
    return value.get<int64_t>();
  }

 private:
  const json& object_;
  const std::string where_;
};

CheckpointPiece read_piece(const Fields& fields, int64_t num_elements) {
  CheckpointPiece piece{.file = fields.text("file")};
  // A name with a directory in it could reach any file of the machine.
  const bool plain = piece.file.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
  if (!plain || !piece.file.ends_with(".safetensors")) {
    fields.fail("file", printable(piece.file) + " is not the plain name of a .safetensors file");
  }
  piece.first = fields.number("first", 0, INT64_MAX);
  if (piece.first >= num_elements) {
    fields.fail("first", std::to_string(piece.first) + " is beyond the " + std::to_string(num_elements) + " elements");
  }
  piece.count = fields.number("count", 1, num_elements - piece.first);
  piece.crc32 = static_cast<uint32_t>(fields.number("crc32", 0, UINT32_MAX));
  return piece;
}

ElementOrder read_order(const Fields& fields, int64_t num_elements) {
  const ElementOrder order{fields.number("row", 1, INT64_MAX), fields.number("run", 1, INT64_MAX)};
  if (num_elements % order.row != 0) {
    fields.fail("row",
                std::to_string(order.row) + " does not divide the " + std::to_string(num_elements) + " elements");
  }
  if (order.row % order.run != 0) {
    fields.fail("run", std::to_string(order.run) + " does not divide the row of " + std::to_string(order.row));
  }
  return order;
}

CheckpointTensor read_tensor(const json& object, const std::string& where) {
  const Fields fields(object, where);
  CheckpointTensor tensor;
  const std::string dtype = fields.text("dtype");
  const std::optional<DType> known = readable_dtype(dtype);
  if (!known) fields.fail("dtype", printable(dtype) + " is not one of F32, F16, BF16");
  tensor.dtype = *known;
  for (const json& dim : fields.array("shape")) tensor.shape.push_back(fields.number("shape", dim, 0, INT64_MAX));
  const std::optional<int64_t> elements = checked_num_elements(tensor.shape);
  if (!elements || *elements > INT64_MAX / 8) fields.fail("shape", "product exceeds 2^60");
  if (fields.has("element_order")) {
    tensor.order = read_order({fields.get("element_order"), where + ": element_order"}, *elements);
  }
  const json& pieces = fields.array("pieces");
  for (size_t i = 0; i < pieces.size(); ++i) {
    tensor.pieces.push_back(read_piece({pieces[i], where + ": pieces[" + std::to_string(i) + "]"}, *elements));
  }
  return tensor;
}

uint32_t checksum(const json& state) {
  const std::string text = state.dump();
  return static_cast<uint32_t>(crc32_z(0, reinterpret_cast<const Bytef*>(text.data()), text.size()));
}

std::string range(int64_t first, int64_t end) {
  return "elements " + std::to_string(first) + " to " + std::to_string(end - 1);
}

void check_tensor(CheckpointTensor& tensor, const std::string& where) {
  std::sort(tensor.pieces.begin(), tensor.pieces.end(), [](const CheckpointPiece& a, const CheckpointPiece& b) {
    return std::tie(a.first, a.count, a.file) < std::tie(b.first, b.count, b.file);
  });
  int64_t covered = 0;
  const CheckpointPiece* before = nullptr;  // the one that ends at `covered`
  for (const CheckpointPiece& piece : tensor.pieces) {
    if (piece.first > covered) throw CorruptFile(where + range(covered, piece.first) + " are missing");
    if (piece.first < covered) {
      throw CorruptFile(where + range(piece.first, std::min(covered, piece.first + piece.count)) +
                        " are there twice, in " + printable(before->file) + " and " + printable(piece.file));
    }
    covered = piece.first + piece.count;
    before = &piece;
  }
  if (const int64_t all = tensor.num_elements(); covered < all) {
    throw CorruptFile(where + range(covered, all) + " are missing");
  }
}

}  // namespace

int64_t CheckpointTensor::num_elements() const { return checked_num_elements(shape).value(); }

std::string piece_key(const std::string& tensor, int64_t first) { return tensor + "@" + std::to_string(first); }

CheckpointManifest parse_manifest(std::string_view text, const std::string& source) {
  const json object = parse_json(text, source);
  const Fields fields(object, source);
  fields.number("format", kFormat, kFormat);
  CheckpointManifest manifest;
  manifest.state = fields.get("state");
  if (!manifest.state.is_object()) fields.fail("state", "is not an object");
  if (fields.has("state_crc32") && fields.number("state_crc32", 0, UINT32_MAX) != checksum(manifest.state)) {
    fields.fail("state", "is damaged: its crc32 is not state_crc32");
  }
  const json& tensors = fields.get("tensors");
  if (!tensors.is_object()) fields.fail("tensors", "is not an object");
  for (const auto& [name, value] : tensors.items()) {
    manifest.tensors[name] = read_tensor(value, source + ": tensor " + printable(name));
  }
  return manifest;
}

std::string manifest_text(const CheckpointManifest& manifest) {
  json tensors = json::object();
  for (const auto& [name, tensor] : manifest.tensors) {
    json pieces = json::array();
    for (const CheckpointPiece& p : tensor.pieces) {
      pieces.push_back({{"file", p.file}, {"first", p.first}, {"count", p.count}, {"crc32", p.crc32}});
    }
    json& written = tensors[name];
    written = {{"dtype", safetensors_dtype(tensor.dtype)}, {"shape", tensor.shape}, {"pieces", pieces}};
    const ElementOrder& order = tensor.order;
    if (order != ElementOrder{}) written["element_order"] = {{"row", order.row}, {"run", order.run}};
  }
  try {
    const json all = {{"format", kFormat},
                      {"state", manifest.state},
                      {"state_crc32", checksum(manifest.state)},
                      {"tensors", tensors}};
    return all.dump(1) + "\n";
  } catch (const json::type_error&) {
    throw InvalidArgument("a checkpoint's tensor name or state is not UTF-8");
  }
}

void add_pieces(CheckpointManifest& manifest, const CheckpointManifest& other, const std::string& source) {
  for (const auto& [name, tensor] : other.tensors) {
    const auto [place, added] = manifest.tensors.emplace(name, tensor);
    if (added) continue;
    CheckpointTensor& all = place->second;
    if (all.shape != tensor.shape || all.dtype != tensor.dtype || all.order != tensor.order) {
      throw CorruptFile(source + ": tensor " + printable(name) + ": its shape, dtype or order is not the other ranks'");
    }
    all.pieces.insert(all.pieces.end(), tensor.pieces.begin(), tensor.pieces.end());
  }
}

void check_coverage(CheckpointManifest& manifest, const std::string& source) {
  for (auto& [name, tensor] : manifest.tensors) check_tensor(tensor, source + ": tensor " + printable(name) + ": ");
}

}  // namespace coterie
