// A safetensors checkpoint whose matrices lie in pairs X_blocks (U8 [..., K / 32, 16]) and X_scales (U8 [..., K / 32]),
// as gpt-oss has its experts: seen as one tensor X_blocks of type MXFP4 with shape [..., K].
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "io/safetensors.h"
#include "io/tensor_source.h"

namespace coterie {

class Mxfp4Source : public TensorSource {
 public:
  // CorruptFile when the shapes of a pair don't fit each other. The file must outlive this.
  explicit Mxfp4Source(const SafetensorsSource& file);

  const std::string& path() const override { return file_.path(); }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;
  void check_readable(const std::string& name) const override;
  std::optional<CodedTensor> codes(const std::string& name) const override;

 private:
  void add_pair(const StoredTensor& blocks, const StoredTensor& scales);

  const SafetensorsSource& file_;
  std::vector<StoredTensor> tensors_;
  std::unordered_map<std::string, size_t> index_;
  std::unordered_map<std::string, std::string> scales_;  // of the pairs, by the name of the blocks
};

}  // namespace coterie
