// What a training checkpoint holds, as its manifest.json says it. A logical tensor lies in pieces, each a range of its
// elements, so that any cut by ranks fits: rows (experts) as well as flat ranges (an optimizer's partitions). Elements
// are counted row-major or, where experts are cut into slices, slice by slice (element_order.h); then the tensor has an
// "element_order": {"row": 48, "run": 24}. The pieces of a tensor cover it without holes or overlap.
//
//   {"format": 1, "state": {...}, "state_crc32": 2468013579,
//    "tensors": {"head.weight": {"dtype": "F32", "shape": [61, 24],
//                                "pieces": [{"file": "rank-00000.safetensors", "first": 0, "count": 1464,
//                                            "crc32": 1234567890}]}}}
//
// In its file a piece is the one-dimensional tensor piece_key(). Checksums are zlib's CRC-32: zlib is on every system,
// and a CRC finds every error burst of up to 32 bits and misses others with probability 2^-32, faster than a disk
// delivers; damage by accident is meant, not by an enemy. The state's is of its text without spaces, keys in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "io/element_order.h"
#include "io/json.h"

namespace coterie {

struct CheckpointPiece {
  std::string file;   // a plain name in the checkpoint's directory
  int64_t first = 0;  // element of the logical tensor, in its order
  int64_t count = 0;  // elements, at least 1
  uint32_t crc32 = 0;
};

struct CheckpointTensor {
  DType dtype = DType::kF32;  // fp32, bf16 or fp16
  std::vector<int64_t> shape;
  ElementOrder order;  // in which pieces count the elements
  std::vector<CheckpointPiece> pieces;

  int64_t num_elements() const;
};

struct CheckpointManifest {
  std::map<std::string, CheckpointTensor> tensors;  // by logical name
  nlohmann::json state = nlohmann::json::object();  // whatever the writer needs to go on
};

// CorruptFile "SOURCE: FIELD: what is wrong". Whether the pieces cover their tensors is check_coverage()'s business.
CheckpointManifest parse_manifest(std::string_view text, const std::string& source);
std::string manifest_text(const CheckpointManifest& manifest);  // InvalidArgument for a name that is not UTF-8

// Adds the pieces that another rank wrote. CorruptFile when a tensor has another shape, dtype or order
// there.
void add_pieces(CheckpointManifest& manifest, const CheckpointManifest& other, const std::string& source);

// Sorts every tensor's pieces. CorruptFile names the first elements that are missing, or there twice and in which
// files.
void check_coverage(CheckpointManifest& manifest, const std::string& source);

std::string piece_key(const std::string& tensor, int64_t first);  // "head.weight@0"

}  // namespace coterie
