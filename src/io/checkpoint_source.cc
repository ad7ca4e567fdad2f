#include "io/checkpoint_source.h"

#include <zlib.h>

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "coterie/error.h"
#include "io/atomic_file.h"
#include "io/printable.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

constexpr char kManifest[] = "manifest.json";

std::string tensor_at(const std::string& path, const std::string& name) {
  return path + ": tensor " + printable(name) + ": ";
}

}  // namespace

bool CheckpointSource::is_checkpoint(const std::string& directory) {
  std::error_code ignored;  // what cannot be examined is none
  return fs::exists(fs::path(directory) / kManifest, ignored);
}

std::string CheckpointSource::manifest_path() const { return (fs::path(path_) / kManifest).string(); }

CheckpointSource::CheckpointSource(const std::string& directory) : path_(directory) {
  if (!is_checkpoint(directory)) {
    throw CorruptFile(directory + ": holds no " + kManifest + ", so it is no checkpoint of this version");
  }
  manifest_ = parse_manifest(read_text_file(manifest_path()), manifest_path());
  check_coverage(manifest_, manifest_path());
  open_files();
  for (const auto& [name, tensor] : manifest_.tensors) {
    const auto bytes = static_cast<size_t>(tensor.num_elements()) * dtype_size(tensor.dtype);
    tensors_.push_back({name, tensor.shape, safetensors_dtype(tensor.dtype), bytes});
  }
}

void CheckpointSource::open_files() {
  std::map<std::string, size_t> listed;  // pieces per file
  for (const auto& [name, tensor] : manifest_.tensors) {
    for (const CheckpointPiece& piece : tensor.pieces) {
      std::unique_ptr<SafetensorsSource>& file = files_[piece.file];
      const std::string file_path = (fs::path(path_) / piece.file).string();
      if (!file && !fs::is_regular_file(file_path)) {
        throw CorruptFile(manifest_path() + ": tensor " + printable(name) + ": file " + printable(piece.file) +
                          " is missing");
      }
      if (!file) file = std::make_unique<SafetensorsSource>(file_path);
      check_piece(name, tensor, piece);
      ++listed[piece.file];
    }
  }
  for (const auto& [file, count] : listed) {
    if (const size_t held = files_[file]->tensors().size(); held != count) {
      throw CorruptFile((fs::path(path_) / file).string() + ": header: holds " + std::to_string(held) +
                        " pieces, but " + kManifest + " lists " + std::to_string(count));
    }
  }
}

void CheckpointSource::check_piece(const std::string& name, const CheckpointTensor& tensor,
                                   const CheckpointPiece& piece) const {
  const SafetensorsSource& file = *files_.at(piece.file);
  const std::string key = piece_key(name, piece.first);
  const StoredTensor* stored = file.find(key);
  // The two were written together, so that one of them is damaged where they differ.
  const auto differ = [&](const std::string& what) {
    return CorruptFile(file.path() + ": header: " + what + ": this file or " + kManifest + " is damaged");
  };
  if (!stored) throw differ("has no tensor " + printable(key) + ", which " + kManifest + " lists");
  if (stored->shape != std::vector{piece.count} || stored->dtype != safetensors_dtype(tensor.dtype)) {
    throw differ("tensor " + printable(key) + " has another shape or dtype than " + kManifest + " says");
  }
}

const StoredTensor* CheckpointSource::find(const std::string& name) const {
  const auto found = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                      [](const StoredTensor& tensor, const std::string& n) { return tensor.name < n; });
  return found != tensors_.end() && found->name == name ? &*found : nullptr;
}

std::span<const std::byte> CheckpointSource::checked_bytes(const std::string& name,
                                                           const CheckpointPiece& piece) const {
  const SafetensorsSource& file = *files_.at(piece.file);
  const std::string key = piece_key(name, piece.first);
  const std::span<const std::byte> bytes = file.raw(key);
  {
    const std::lock_guard lock(mutex_);
    if (intact_.contains(&piece)) return bytes;
  }
  if (crc32_z(0, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()) != piece.crc32) {
    throw CorruptFile(tensor_at(file.path(), key) + "is damaged: its crc32 is not the one in " + kManifest);
  }
  const std::lock_guard lock(mutex_);
  intact_.insert(&piece);
  return bytes;
}

// A tensor's elements in the order of its pieces.
class CheckpointSource::StoredElements {
 public:
  StoredElements(const CheckpointSource& source, const std::string& name, const CheckpointTensor& tensor)
      : source_(source), name_(name), tensor_(tensor), bytes_(tensor.pieces.size()) {}

  void read(int64_t first, int64_t count, float* out) {
    // The last piece that begins at or before `first`, and those that follow.
    const std::vector<CheckpointPiece>& pieces = tensor_.pieces;
    const auto after = std::upper_bound(pieces.begin(), pieces.end(), first,
                                        [](int64_t at, const CheckpointPiece& piece) { return at < piece.first; });
    auto index = static_cast<size_t>(after - pieces.begin()) - 1;
    const size_t size = dtype_size(tensor_.dtype);
    for (int64_t done = 0; done < count; ++index) {
      const CheckpointPiece& piece = pieces[index];
      const int64_t skip = first + done - piece.first, n = std::min(count - done, piece.count - skip);
      const std::byte* from = bytes(index).data() + static_cast<size_t>(skip) * size;
      convert_to_float(from, tensor_.dtype, out + done, static_cast<size_t>(n));
      done += n;
    }
  }

 private:
  std::span<const std::byte> bytes(size_t index) {
    if (bytes_[index].empty()) bytes_[index] = source_.checked_bytes(name_, tensor_.pieces[index]);
    return bytes_[index];
  }

  const CheckpointSource& source_;
  const std::string& name_;
  const CheckpointTensor& tensor_;
  std::vector<std::span<const std::byte>> bytes_;  // of the pieces that were read
};

void CheckpointSource::read_range(const std::string& name, int64_t first, int64_t count, float* out,
                                  const ElementOrder& order) const {
  const auto found = manifest_.tensors.find(name);
  if (found == manifest_.tensors.end()) throw InvalidArgument(tensor_at(path_, name) + "is missing");
  const CheckpointTensor& tensor = found->second;
  const int64_t elements = tensor.num_elements();
  if (first < 0 || count < 0 || first > elements || count > elements - first) {
    throw InvalidArgument(tensor_at(path_, name) + "has no " + std::to_string(count) + " elements from " +
                          std::to_string(first) + " on, but " + std::to_string(elements));
  }
  COTERIE_CHECK(fits(order, elements), "an order of another tensor: " + name);
  StoredElements stored(*this, name, tensor);
  const ElementOrder place = inverse(tensor.order, elements);
  for_each_run(order, elements, first, count, [&](int64_t logical, int64_t n) {
    for_each_run(place, elements, logical, n, [&](int64_t at, int64_t m) {
      stored.read(at, m, out);
      out += m;
    });
  });
}

void CheckpointSource::read(const std::string& name, float* out) const {
  const StoredTensor* tensor = find(name);
  read_range(name, 0, tensor ? tensor->num_elements() : 0, out);
}

}  // namespace coterie
