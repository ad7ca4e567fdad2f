#include "model/checkpoint_map.h"

#include <algorithm>
#include <set>
#include <utility>

#include "base/check.h"
#include "coterie/error.h"

namespace coterie {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t dim : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  return n;
}

// Element (row, col) of the block lies at first + row * row_stride + col * col_stride when stored.
struct StoredBlock {
  int64_t first, row_stride, col_stride;

  explicit StoredBlock(const Piece& piece) {
    const int64_t stored_rows = piece.stored_shape.back();  // of a transposed matrix, [cols, all rows]
    first = piece.transposed ? piece.stored_row : piece.stored_row * piece.cols;
    row_stride = piece.transposed ? 1 : piece.cols;
    col_stride = piece.transposed ? stored_rows : 1;
  }
};

bool is_whole(const Piece& piece) {
  return !piece.transposed && piece.rows * piece.cols == product(piece.stored_shape);
}

}  // namespace

LogicalName::LogicalName(const std::string& name) {
  const size_t dot = name.rfind('.');
  kind = name.substr(dot + 1);
  module = name.substr(0, dot);
  const std::string layers = "model.layers.";
  if (!module.starts_with(layers)) return;
  const size_t end = module.find('.', layers.size());
  layer = std::stoll(module.substr(layers.size(), end - layers.size()));
  module = module.substr(end + 1);
}

Piece whole_piece(const TensorSpec& spec, std::string stored, bool transposed) {
  Piece piece;
  piece.stored = std::move(stored);
  piece.stored_shape = spec.shape;
  piece.cols = spec.shape.size() > 1 ? spec.shape.back() : 1;
  piece.rows = spec.num_elements() / piece.cols;
  piece.transposed = transposed && spec.shape.size() > 1;
  if (piece.transposed) std::reverse(piece.stored_shape.begin(), piece.stored_shape.end());
  return piece;
}

CheckpointMap map_tensors(
    const ModelConfig& config,
    const std::function<std::vector<std::vector<Piece>>(const LogicalName&, const TensorSpec&)>& forms) {
  CheckpointMap map;
  for (TensorSpec& spec : logical_tensors(config)) {
    MappedTensor tensor{spec, forms(LogicalName(spec.name), spec)};
    for (const std::vector<Piece>& form : tensor.forms) {
      int64_t covered = 0;
      for (const Piece& piece : form) covered += piece.rows * piece.cols;
      COTERIE_CHECK(covered == spec.num_elements(), spec.name + " is not covered by its pieces");
    }
    map.tensors.push_back(std::move(tensor));
  }
  return map;
}

LogicalReader::LogicalReader(const TensorSource& source, CheckpointMap map) : source_(source), map_(std::move(map)) {
  for (const MappedTensor& tensor : map_.tensors) {
    const auto in_file = [&](const std::vector<Piece>& form) { return source_.find(stored_name(form[0].stored)); };
    const auto found = std::find_if(tensor.forms.begin(), tensor.forms.end(), in_file);
    form_.push_back(found == tensor.forms.end() ? 0 : found - tensor.forms.begin());
    for (const Piece& piece : tensor.forms[form_.back()]) check_piece(piece);
  }
  check_surplus();
}

// The name under which the file has a tensor: as mapped, or without the prefix of the base model.
std::string LogicalReader::stored_name(const std::string& name) const {
  const std::string& prefix = map_.base_prefix;
  if (prefix.empty() || !name.starts_with(prefix) || source_.find(name)) return name;
  const std::string bare = name.substr(prefix.size());
  return source_.find(bare) ? bare : name;
}

void LogicalReader::check_piece(const Piece& piece) const {
  const std::string where = source_.path() + ": " + piece.stored + ": ";
  const StoredTensor* stored = source_.find(stored_name(piece.stored));
  if (!stored) throw CorruptFile(where + "missing");
  if (stored->shape != piece.stored_shape) {
    throw CorruptFile(where + "shape " + shape_text(stored->shape) + " is not " + shape_text(piece.stored_shape));
  }
}

void LogicalReader::check_surplus() const {
  std::set<std::string> used;
  for (size_t i = 0; i < map_.tensors.size(); ++i) {
    for (const Piece& piece : map_.tensors[i].forms[form_[i]]) used.insert(stored_name(piece.stored));
  }
  for (const StoredTensor& stored : source_.tensors()) {
    const auto is_suffix = [&](const std::string& suffix) { return stored.name.ends_with(suffix); };
    if (!map_.ignored_prefix.empty() && stored.name.starts_with(map_.ignored_prefix)) continue;
    if (used.contains(stored.name) || std::ranges::any_of(map_.ignored_suffixes, is_suffix)) continue;
    throw CorruptFile(source_.path() + ": " + stored.name + ": not a tensor of this model");
  }
}

const MappedTensor* LogicalReader::find(const std::string& name) const {
  const auto found = std::ranges::find_if(map_.tensors, [&](const MappedTensor& t) { return t.spec.name == name; });
  return found == map_.tensors.end() ? nullptr : &*found;
}

bool LogicalReader::has(const std::string& name) const { return find(name) != nullptr; }

std::vector<float> LogicalReader::read(const std::string& name) const {
  const MappedTensor* tensor = find(name);
  COTERIE_CHECK(tensor, name + " is not a tensor of this model");
  std::vector<float> logical(tensor->spec.num_elements()), stored;
  for (const Piece& piece : tensor->forms[form_[tensor - map_.tensors.data()]]) {
    if (is_whole(piece)) {
      source_.read(stored_name(piece.stored), logical.data() + piece.offset);
      continue;
    }
    stored.resize(product(piece.stored_shape));
    source_.read(stored_name(piece.stored), stored.data());
    copy_to_logical(piece, stored.data(), logical.data());
  }
  return logical;
}

void copy_to_logical(const Piece& piece, const float* stored, float* logical) {
  const StoredBlock block(piece);
  for (int64_t r = 0; r < piece.rows; ++r) {
    for (int64_t c = 0; c < piece.cols; ++c) {
      logical[piece.offset + r * piece.cols + c] = stored[block.first + r * block.row_stride + c * block.col_stride];
    }
  }
}

void copy_to_stored(const Piece& piece, const float* logical, float* stored) {
  const StoredBlock block(piece);
  for (int64_t r = 0; r < piece.rows; ++r) {
    for (int64_t c = 0; c < piece.cols; ++c) {
      stored[block.first + r * block.row_stride + c * block.col_stride] = logical[piece.offset + r * piece.cols + c];
    }
  }
}

}  // namespace coterie
