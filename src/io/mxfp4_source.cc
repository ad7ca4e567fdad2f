#include "io/mxfp4_source.h"

#include <algorithm>

#include "coterie/error.h"
#include "io/mxfp4.h"
#include "io/printable.h"

namespace coterie {
namespace {

const std::string kBlocks = "_blocks", kScales = "_scales";

// The name of X_scales, or of X_blocks, from the other.
std::string partner(const std::string& name, const std::string& suffix, const std::string& other) {
  return name.substr(0, name.size() - suffix.size()) + other;
}

}  // namespace

Mxfp4Source::Mxfp4Source(const SafetensorsSource& file) : file_(file) {
  for (const StoredTensor& stored : file.tensors()) {
    if (stored.name.ends_with(kScales) && file.find(partner(stored.name, kScales, kBlocks))) continue;
    const StoredTensor* scales =
        stored.name.ends_with(kBlocks) ? file.find(partner(stored.name, kBlocks, kScales)) : nullptr;
    if (scales) {
      add_pair(stored, *scales);
    } else {
      tensors_.push_back(stored);
    }
    index_[tensors_.back().name] = tensors_.size() - 1;
  }
}

void Mxfp4Source::add_pair(const StoredTensor& blocks, const StoredTensor& scales) {
  std::vector<int64_t> shape = blocks.shape;
  const bool whole = blocks.dtype == "U8" && scales.dtype == "U8" && shape.size() >= 3 && shape.back() == 16;
  if (whole) shape.pop_back();
  if (!whole || scales.shape != shape) {
    throw CorruptFile(path() + ": " + printable(blocks.name) + ": is not U8 [..., K / 32, 16] beside " +
                      printable(scales.name) + ", U8 [..., K / 32]");
  }
  shape.back() *= kMxfp4Block;
  tensors_.push_back({blocks.name, shape, "MXFP4", blocks.bytes + scales.bytes, /*has_codes=*/true});
  scales_[blocks.name] = scales.name;
}

const StoredTensor* Mxfp4Source::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

void Mxfp4Source::check_readable(const std::string& name) const {
  if (!scales_.contains(name)) file_.check_readable(name);
}

void Mxfp4Source::read(const std::string& name, float* out) const {
  const auto scales = scales_.find(name);
  if (scales == scales_.end()) return file_.read(name, out);
  decode_mxfp4(file_.raw(name), file_.raw(scales->second), out);
}

std::optional<CodedTensor> Mxfp4Source::codes(const std::string& name) const {
  const auto scales = scales_.find(name);
  if (scales == scales_.end()) return std::nullopt;
  const StoredTensor& stored = *find(name);
  CodedTensor tensor{.rows = stored.num_elements() / std::max<int64_t>(stored.shape.back(), 1),
                     .cols = stored.shape.back()};
  tensor.codes = file_.bytes(name);
  tensor.scales = file_.bytes(scales->second);
  return tensor;
}

}  // namespace coterie
