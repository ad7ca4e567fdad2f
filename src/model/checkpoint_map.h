// Which pieces of a checkpoint's tensors make up each logical tensor (tensors.h). One table per
// architecture serves reading and writing: reading copies pieces into logical tensors, writing copies
// them back into stored ones.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "io/tensor_source.h"
#include "model/config.h"
#include "model/tensors.h"

namespace coterie {

// A block that a stored and a logical tensor have in common. In the logical tensor it is [rows, cols],
// contiguous from element `offset` on. In the stored one, element (r, c) is number
// first + r * row_stride + c * col_stride: rows of a matrix, columns of a transposed one (GPT-2's Conv1D), every
// second row (gpt-oss's gates).
struct Piece {
  std::string stored;
  std::vector<int64_t> stored_shape;
  int64_t offset = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t first = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
};

struct MappedTensor {
  TensorSpec spec;
  // Alternatives: a MoE layer's experts lie in files one by one or stacked. The first is the one that
  // we write; a file is read in whichever form it has.
  std::vector<std::vector<Piece>> forms;
};

struct CheckpointMap {
  std::vector<MappedTensor> tensors;           // in the order of logical_tensors()
  std::string base_prefix;                     // "transformer.": files of the model without its head leave it out
  std::vector<std::string> ignored_suffixes;   // stored buffers that are no weights
  std::string ignored_prefix;                  // what else is none; empty: nothing
  std::string layer_prefix = "model.layers.";  // before the number of a layer
  int64_t first_ignored_layer = -1;            // tensors of layers from this number on are of no use either; -1: none
};

// A logical name taken apart: "model.layers.3.mlp.up.weight" is layer 3, "mlp.up", "weight".
struct LogicalName {
  int64_t layer = -1;  // -1: not in a layer; then `module` is the whole name but ".weight"
  std::string module;
  std::string kind;  // "weight", "bias" or "choice_bias"

  explicit LogicalName(const std::string& name);
};

// The whole logical tensor under one stored name.
Piece whole_piece(const TensorSpec& spec, std::string stored, bool transposed = false);

// Asks `forms` for every logical tensor of the model.
CheckpointMap map_tensors(
    const ModelConfig& config,
    const std::function<std::vector<std::vector<Piece>>(const LogicalName&, const TensorSpec&)>& forms);

// Reads logical tensors from a file. The constructor compares names, shapes and types of everything, so that
// a wrong file fails before any work is done: CorruptFile "FILE: TENSOR: missing", "... shape [2, 3] is
// not [2, 4]", "... not a tensor of this model"; InvalidArgument for a type that is not read.
class LogicalReader {
 public:
  LogicalReader(const TensorSource& source, CheckpointMap map);  // source must outlive the reader

  const std::vector<MappedTensor>& tensors() const { return map_.tensors; }
  bool has(const std::string& name) const;

  // The tensor as fp32, row-major in its logical shape. Safe from any number of threads.
  std::vector<float> read(const std::string& name) const;

  // "MXFP4" or another type, where all of the tensor lies in codes of it (TensorSource::codes); else empty.
  std::string codes_type(const std::string& name) const;
  // Those codes; nothing where there are none, or its pieces are not whole rows. Rows are those of the logical tensor:
  // [E * U, D] of experts' up.
  std::optional<CodedTensor> read_codes(const std::string& name) const;

 private:
  const MappedTensor* find(const std::string& name) const;
  const std::vector<Piece>& pieces(const std::string& name) const;
  std::string stored_name(const std::string& name) const;
  void check_piece(const Piece& piece) const;
  void check_surplus() const;
  bool is_of_ignored_layer(const std::string& name) const;

  const TensorSource& source_;
  CheckpointMap map_;
  std::vector<size_t> form_;  // chosen alternative of each tensor
};

// Copies a block between a logical tensor and a whole stored one.
void copy_to_logical(const Piece& piece, const float* stored, float* logical);
void copy_to_stored(const Piece& piece, const float* logical, float* stored);

}  // namespace coterie
