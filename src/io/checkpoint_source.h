// A training checkpoint (checkpoint_directory.h) for reading: any range of any logical tensor, in any order of its
// elements, whatever pieces hold it, whatever layout of ranks wrote them. Opening it checks that every logical tensor
// is covered exactly once and that its pieces lie in their files; a piece's checksum is checked when it is first read.
// CorruptFile names what is missing, twice there, or damaged.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "io/checkpoint_manifest.h"
#include "io/safetensors.h"
#include "io/tensor_source.h"

namespace coterie {

class CheckpointSource : public TensorSource {
 public:
  explicit CheckpointSource(const std::string& directory);

  static bool is_checkpoint(const std::string& directory);  // whether it holds a manifest.json

  const std::string& path() const override { return path_; }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }  // logical, by name
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;

  // Elements [first, first + count) of this order, which fits the tensor, as fp32. InvalidArgument when there is no
  // such tensor or it has fewer elements.
  void read_range(const std::string& name, int64_t first, int64_t count, float* out,
                  const ElementOrder& order = {}) const;

  const CheckpointManifest& manifest() const { return manifest_; }
  const nlohmann::json& state() const { return manifest_.state; }
  std::string manifest_path() const;

 private:
  void open_files();
  void check_piece(const std::string& name, const CheckpointTensor& tensor, const CheckpointPiece& piece) const;
  std::span<const std::byte> checked_bytes(const std::string& name, const CheckpointPiece& piece) const;
  class StoredElements;

  std::string path_;
  CheckpointManifest manifest_;
  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::unique_ptr<SafetensorsSource>> files_;
  mutable std::mutex mutex_;                         // of intact_
  mutable std::set<const CheckpointPiece*> intact_;  // pieces whose checksum was found right
};

}  // namespace coterie
