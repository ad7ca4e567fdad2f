#include "model/quantized_source.h"

#include <algorithm>
#include <cctype>
#include <set>
#include <utility>

#include "base/check.h"
#include "coterie/error.h"
#include "io/mxfp4.h"
#include "model/tensors.h"

namespace coterie {
namespace {

const std::string kCodes = "_codes", kScales = "_scales", kMinimums = "_minimums", kFactors = "_factors";

}  // namespace

std::string codes_name(PanelType type) {
  std::string name(panel_type_name(type == PanelType::kInt8A16 ? PanelType::kInt8 : type));
  std::ranges::transform(name, name.begin(), [](unsigned char c) { return std::toupper(c); });
  return name;
}

QuantizedView view_of_codes(const CodedTensor& tensor, PanelType type) {
  QuantizedView view = {.type = type,
                        .rows = tensor.rows,
                        .cols = tensor.cols,
                        .codes = reinterpret_cast<const uint32_t*>(tensor.codes.data())};
  const bool coded = quantized_format(type).stored_minimum;
  if (coded) {
    view.scale_codes = tensor.scales.data();
    view.minimum_codes = reinterpret_cast<const int8_t*>(tensor.minimums.data());
    view.row_factors = reinterpret_cast<const float*>(tensor.row_factors.data());
  } else {
    view.scales = reinterpret_cast<const BFloat16*>(tensor.scales.data());
  }
  const auto rows = static_cast<size_t>(tensor.rows);
  COTERIE_CHECK(tensor.codes.size() == rows * view.row_words() * sizeof(uint32_t), "codes of another type");
  COTERIE_CHECK(tensor.scales.size() == rows * view.groups() * (coded ? 1 : sizeof(BFloat16)),
                "scales of another type");
  return view;
}

QuantizedMatrix from_mxfp4(const CodedTensor& tensor) {
  QuantizedMatrix m(PanelType::kMxfp4, tensor.rows, tensor.cols);
  auto* const out = reinterpret_cast<uint8_t*>(m.codes());
  const auto code = [&](int64_t k) { return tensor.codes[k / 2] >> 4 * (k % 2) & 15; };
  for (int64_t k = 0; k < tensor.rows * tensor.cols; k += 8) {
    for (int64_t j = 0; j < 4; ++j) out[k / 2 + j] = static_cast<uint8_t>(code(k + j) | code(k + 4 + j) << 4);
  }
  for (size_t i = 0; i < tensor.scales.size(); ++i) m.scales()[i] = to_bfloat16(mxfp4_scale(tensor.scales[i]) / 2);
  return m;
}

QuantizedSource::QuantizedSource(const SafetensorsSource& file, const TensorSource& rest, const ModelConfig& config,
                                 const WeightTypes& types)
    : file_(file), rest_(rest) {
  std::set<std::string> parts;
  for (const TensorSpec& spec : logical_tensors(config)) {
    if (!file.find(spec.name + kCodes)) continue;
    add_matrix(spec.name, spec.shape, type_of_tensor(types, spec.name));
    for (const std::string& suffix : {kCodes, kScales, kMinimums, kFactors}) parts.insert(spec.name + suffix);
  }
  for (const StoredTensor& stored : rest.tensors()) {
    if (!parts.contains(stored.name)) tensors_.push_back(stored);
  }
  for (size_t i = 0; i < tensors_.size(); ++i) index_[tensors_[i].name] = i;
}

void QuantizedSource::add_matrix(const std::string& name, const std::vector<int64_t>& shape, PanelType type) {
  if (!is_quantized(type)) {
    throw CorruptFile(path() + ": " + name + kCodes + ": a tensor that config.json's quantization_config keeps in " +
                      std::string(panel_type_name(type)));
  }
  const int64_t K = shape.back();
  size_t bytes = 0;
  bytes += part(name + kCodes, "U8", shape, QuantizedView::quantized_row_words(type, K) * 4).bytes;
  const bool coded = quantized_format(type).stored_minimum;
  bytes += part(name + kScales, coded ? "U8" : "BF16", shape, groups_of(type, K)).bytes;
  if (coded) {
    bytes += part(name + kMinimums, "I8", shape, groups_of(type, K)).bytes;
    bytes += part(name + kFactors, "F32", shape, 1).bytes;
  }
  tensors_.push_back({name, shape, codes_name(type), bytes, /*has_codes=*/true});
  matrices_[name] = type;
}

// A part of a matrix, which must be of this type and have rows of this size.
const StoredTensor& QuantizedSource::part(const std::string& name, const std::string& dtype, std::vector<int64_t> shape,
                                          int64_t row_size) const {
  shape.back() = row_size;
  const StoredTensor* stored = file_.find(name);
  if (!stored) throw CorruptFile(path() + ": " + name + ": missing");
  if (stored->dtype != dtype || stored->shape != shape) {
    throw CorruptFile(path() + ": " + name + ": is not " + dtype + " with rows of " + std::to_string(row_size) +
                      ", as config.json's quantization_config has it");
  }
  return *stored;
}

const StoredTensor* QuantizedSource::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

std::optional<CodedTensor> QuantizedSource::codes(const std::string& name) const {
  const auto matrix = matrices_.find(name);
  if (matrix == matrices_.end()) return rest_.codes(name);
  const StoredTensor& stored = *find(name);
  CodedTensor tensor{.rows = stored.num_elements() / std::max<int64_t>(stored.shape.back(), 1),
                     .cols = stored.shape.back()};
  tensor.codes = file_.bytes(name + kCodes);
  tensor.scales = file_.bytes(name + kScales);
  if (quantized_format(matrix->second).stored_minimum) {
    tensor.minimums = file_.bytes(name + kMinimums);
    tensor.row_factors = file_.bytes(name + kFactors);
  }
  return tensor;
}

void QuantizedSource::check_readable(const std::string& name) const {
  if (!matrices_.contains(name)) rest_.check_readable(name);
}

void QuantizedSource::read(const std::string& name, float* out) const {
  const auto matrix = matrices_.find(name);
  if (matrix == matrices_.end()) return rest_.read(name, out);
  const CodedTensor tensor = *codes(name);
  const QuantizedView view = view_of_codes(tensor, matrix->second);
  for (int64_t row = 0; row < view.rows; ++row) {
    for (int64_t col = 0; col < view.cols; ++col) *out++ = view.element(row, col);
  }
}

}  // namespace coterie
