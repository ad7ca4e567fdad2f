// GGUF files (version 2 and 3, little endian): typed metadata and tensors, dequantized to fp32 on
// reading: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, MXFP4. Hostile files end in CorruptFile
// naming file, field and value; a tensor of another type than these can be listed, not read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "io/tensor_source.h"

namespace coterie {

// A metadata value; numbers are widened.
using GgufValue = std::variant<int64_t, double, bool, std::string, std::vector<int64_t>, std::vector<double>,
                               std::vector<std::string>>;

class GgufSource : public TensorSource {
 public:
  explicit GgufSource(const std::string& path);
  ~GgufSource() override;

  const std::string& path() const override;
  const std::vector<StoredTensor>& tensors() const override;
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;
  std::optional<CodedTensor> codes(const std::string& name) const override;

  const std::vector<std::pair<std::string, GgufValue>>& metadata() const;
  const GgufValue* find_metadata(const std::string& key) const;  // null when absent

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace coterie
