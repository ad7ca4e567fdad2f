// Checkpoints with quantized weights of our own: a matrix X [..., K] lies as X_codes (U8 [..., bytes of a row]),
// X_scales (BF16 [..., groups]) or, where its type stores minimums, X_scales (U8 [..., groups]), X_minimums (I8
// likewise) and X_factors (F32 [..., 1]), all as QuantizedView has them (kernels/quantized.h), the same on every
// machine. Seen as one tensor X of type INT8, INT4 or INT4_64.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "io/safetensors.h"
#include "io/tensor_source.h"
#include "kernels/quantized.h"
#include "model/config.h"
#include "model/weight_types.h"

namespace coterie {

// "INT8" for kInt8 and kInt8A16, which differ in activations alone; "INT4", "INT4_64", "MXFP4".
std::string codes_name(PanelType type);

// Of a checkpoint as codes_name() has it, for panels of that type. The tensor must outlive the view; not for MXFP4.
QuantizedView view_of_codes(const CodedTensor& tensor, PanelType type);
// MXFP4 in the order of QuantizedView.
QuantizedMatrix from_mxfp4(const CodedTensor& tensor);

class QuantizedSource : public TensorSource {
 public:
  // rest: the same file, or a view of it, with everything but these matrices. Which of the tensors of a model of
  // `config` lie in codes is seen from their names, in which type from `types`. CorruptFile when parts don't fit each
  // other. All must outlive this.
  QuantizedSource(const SafetensorsSource& file, const TensorSource& rest, const ModelConfig& config,
                  const WeightTypes& types);

  const std::string& path() const override { return file_.path(); }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  const StoredTensor* find(const std::string& name) const override;
  void read(const std::string& name, float* out) const override;
  void check_readable(const std::string& name) const override;
  std::optional<CodedTensor> codes(const std::string& name) const override;

 private:
  void add_matrix(const std::string& name, const std::vector<int64_t>& shape, PanelType type);
  const StoredTensor& part(const std::string& name, const std::string& dtype, std::vector<int64_t> shape,
                           int64_t row_size) const;

  const SafetensorsSource& file_;
  const TensorSource& rest_;
  std::vector<StoredTensor> tensors_;
  std::unordered_map<std::string, size_t> index_;
  std::unordered_map<std::string, PanelType> matrices_;
};

}  // namespace coterie
