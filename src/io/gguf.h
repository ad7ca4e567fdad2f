// GGUF files: typed metadata and tensors, dequantized to fp32 on reading: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1,
// Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4. Hostile files end in CorruptFile naming file, field and value; a
// tensor of another type than these can be listed, not read.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "io/gguf_file.h"
#include "io/tensor_source.h"

namespace coterie {

// One file, or all that a model is split into (metadata split.no, split.count, split.tensors.count), which lie beside
// each other under the names of gguf_parts.h. path: any of them. The metadata is that of the first, as is path().
class GgufSource : public TensorSource {
 public:
  explicit GgufSource(const std::string& path);

  const std::string& path() const override { return files_[0].path(); }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;
  void check_readable(const std::string& name) const override;
  std::optional<CodedTensor> codes(const std::string& name) const override;

  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return files_[0].metadata; }
  const GgufValue* find_metadata(const std::string& key) const { return files_[0].find_metadata(key); }

 private:
  struct Place {
    const GgufFile& file;
    const GgufTensor& tensor;
  };
  Place locate(const std::string& name) const;  // InvalidArgument where there is none

  std::vector<GgufFile> files_;
  std::vector<StoredTensor> tensors_;
  std::vector<std::pair<size_t, size_t>> places_;  // of each: its file, and its number there
  std::unordered_map<std::string, size_t> index_;
};

}  // namespace coterie
