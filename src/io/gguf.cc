#include "io/gguf.h"

#include <filesystem>
#include <optional>

#include "coterie/error.h"
#include "io/gguf_parts.h"
#include "io/mxfp4.h"
#include "io/printable.h"

namespace coterie {
namespace {

[[noreturn]] void fail(const GgufFile& file, const std::string& key, const std::string& what) {
  throw CorruptFile(file.path() + ": metadata '" + key + "': " + what);
}

std::optional<int64_t> integer(const GgufFile& file, const std::string& key) {
  const GgufValue* value = file.find_metadata(key);
  if (!value) return std::nullopt;
  if (const auto* number = std::get_if<int64_t>(value)) return *number;
  fail(file, key, "is not a whole number");
}

void require(const GgufFile& file, const std::string& key, int64_t expected, const std::string& meaning) {
  const std::optional<int64_t> value = integer(file, key);
  if (value == expected) return;
  fail(file, key, (value ? std::to_string(*value) : "missing") + " is not " + std::to_string(expected) + meaning);
}

// The file, or, where it says that it is one of several, all of them.
std::vector<GgufFile> open_all(const std::string& path) {
  std::vector<GgufFile> files;
  GgufFile given(path);
  const int64_t count = integer(given, "split.count").value_or(1);
  if (count <= 1) {
    files.push_back(std::move(given));
    return files;
  }
  const std::vector<std::string> parts = gguf_parts(path);
  const auto num_parts = static_cast<int64_t>(parts.size());
  require(given, "split.count", num_parts, ", the number of files by its name (NAME-00001-of-00003.gguf)");
  for (const std::string& part : parts) {
    const auto number = static_cast<int64_t>(files.size());
    if (!std::filesystem::exists(part)) {
      throw CorruptFile(part + ": is missing; " + std::to_string(count) + " files make up the model");
    }
    const GgufFile& file = files.emplace_back(part);
    require(file, "split.count", count, ", which the others say");
    require(file, "split.no", number, ", as its name says");
  }
  return files;
}

}  // namespace

GgufSource::GgufSource(const std::string& path) : files_(open_all(path)) {
  for (size_t f = 0; f < files_.size(); ++f) {
    for (size_t i = 0; i < files_[f].tensors.size(); ++i) {
      const StoredTensor& stored = files_[f].tensors[i].stored;
      const auto [other, added] = index_.emplace(stored.name, tensors_.size());
      if (!added) {
        throw CorruptFile(files_[f].path() + ": tensor " + printable(stored.name) + ": lies in " +
                          files_[places_[other->second].first].path() + ", too");
      }
      tensors_.push_back(stored);
      places_.emplace_back(f, i);
    }
  }
  if (files_.size() == 1) return;
  for (const GgufFile& file : files_) {
    require(file, "split.tensors.count", static_cast<int64_t>(tensors_.size()), ", the number of tensors in all files");
  }
}

const StoredTensor* GgufSource::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

GgufSource::Place GgufSource::locate(const std::string& name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) throw InvalidArgument(path() + ": there is no tensor " + printable(name));
  const auto& [file, number] = places_[found->second];
  return {files_[file], files_[file].tensors[number]};
}

void GgufSource::check_readable(const std::string& name) const {
  const auto [file, tensor] = locate(name);
  if (tensor.type->dequantize) return;
  throw InvalidArgument(file.path() + ": tensor " + printable(name) + ": type: " + tensor.type->name +
                        " is not one of " + readable_ggml_types());
}

void GgufSource::read(const std::string& name, float* out) const {
  check_readable(name);
  const auto [file, tensor] = locate(name);
  const int64_t num_blocks = tensor.stored.num_elements() / tensor.type->block_elements;
  tensor.type->dequantize(file.blocks_of(tensor), num_blocks, out);
}

// ggml keeps scale and codes together, and halves of a block in the nibbles of a byte.
std::optional<CodedTensor> GgufSource::codes(const std::string& name) const {
  const StoredTensor* stored = find(name);
  if (!stored || !stored->has_codes) return std::nullopt;
  const auto [file, place] = locate(name);
  const std::byte* block = file.blocks_of(place);
  CodedTensor tensor{.rows = 0, .cols = stored->shape.back()};
  tensor.rows = tensor.cols == 0 ? 0 : stored->num_elements() / tensor.cols;
  const int64_t num_blocks = stored->num_elements() / kMxfp4Block;
  tensor.codes.reserve(static_cast<size_t>(num_blocks * kMxfp4Block / 2));
  for (int64_t b = 0; b < num_blocks; ++b, block += place.type->block_bytes) {
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
