#include "model/checkpoint_map.h"

#include <algorithm>
#include <charconv>
#include <set>
#include <utility>

#include "base/check.h"
#include "coterie/error.h"
#include "io/printable.h"

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

bool is_whole(const Piece& piece) {
  return piece.rows * piece.cols == product(piece.stored_shape) && piece.row_stride == piece.cols &&
         piece.col_stride == 1;
}

// Whether each row of a piece is one row of both matrices, so that it can be copied as it is.
bool is_of_whole_rows(const Piece& piece, const CodedTensor& stored, int64_t logical_cols) {
  return piece.cols == stored.cols && piece.cols == logical_cols && piece.col_stride == 1 &&
         piece.first % piece.cols == 0 && piece.row_stride % piece.cols == 0 && piece.offset % piece.cols == 0;
}

// Row r of the piece, in each part of the codes. `to` knows its rows; its parts get their sizes with the first one.
void copy_row(const CodedTensor& from, const Piece& piece, int64_t r, CodedTensor& to) {
  const int64_t source = (piece.first + r * piece.row_stride) / piece.cols, target = piece.offset / piece.cols + r;
  const auto copy = [&](const std::vector<uint8_t>& part, std::vector<uint8_t>& out) {
    const auto bytes = static_cast<int64_t>(part.size()) / from.rows;
    out.resize(static_cast<size_t>(to.rows * bytes));
    std::copy_n(part.begin() + source * bytes, bytes, out.begin() + target * bytes);
  };
  copy(from.codes, to.codes);
  copy(from.scales, to.scales);
  copy(from.minimums, to.minimums);
  copy(from.row_factors, to.row_factors);
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
  const int64_t cols = spec.shape.size() > 1 ? spec.shape.back() : 1, rows = spec.num_elements() / cols;
  Piece piece = {.stored = std::move(stored), .stored_shape = spec.shape, .rows = rows, .cols = cols};
  piece.row_stride = cols;
  if (transposed && spec.shape.size() > 1) {
    std::reverse(piece.stored_shape.begin(), piece.stored_shape.end());
    piece.row_stride = 1, piece.col_stride = rows;
  }
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
  source_.check_readable(stored->name);
}

void LogicalReader::check_surplus() const {
  std::set<std::string> used;
  for (size_t i = 0; i < map_.tensors.size(); ++i) {
    for (const Piece& piece : map_.tensors[i].forms[form_[i]]) used.insert(stored_name(piece.stored));
  }
  for (const StoredTensor& stored : source_.tensors()) {
    const auto is_suffix = [&](const std::string& suffix) { return stored.name.ends_with(suffix); };
    if (!map_.ignored_prefix.empty() && stored.name.starts_with(map_.ignored_prefix)) continue;
    if (is_of_ignored_layer(stored.name)) continue;
    if (used.contains(stored.name) || std::ranges::any_of(map_.ignored_suffixes, is_suffix)) continue;
    throw CorruptFile(source_.path() + ": " + printable(stored.name) + ": not a tensor of this model");
  }
}

bool LogicalReader::is_of_ignored_layer(const std::string& name) const {
  const std::string& layers = map_.layer_prefix;
  if (map_.first_ignored_layer < 0 || !name.starts_with(layers)) return false;
  int64_t layer = 0;
  const auto [end, error] = std::from_chars(name.data() + layers.size(), name.data() + name.size(), layer);
  return error == std::errc() && *end == '.' && layer >= map_.first_ignored_layer;
}

const MappedTensor* LogicalReader::find(const std::string& name) const {
  const auto found = std::ranges::find_if(map_.tensors, [&](const MappedTensor& t) { return t.spec.name == name; });
  return found == map_.tensors.end() ? nullptr : &*found;
}

bool LogicalReader::has(const std::string& name) const { return find(name) != nullptr; }

const std::vector<Piece>& LogicalReader::pieces(const std::string& name) const {
  const MappedTensor* tensor = find(name);
  COTERIE_CHECK(tensor, name + " is not a tensor of this model");
  return tensor->forms[form_[tensor - map_.tensors.data()]];
}

std::string LogicalReader::codes_type(const std::string& name) const {
  const auto stored = [&](const Piece& piece) { return source_.find(stored_name(piece.stored)); };
  const StoredTensor& first = *stored(pieces(name)[0]);
  const bool all_alike = std::ranges::all_of(pieces(name), [&](const Piece& piece) {
    return stored(piece)->has_codes && stored(piece)->dtype == first.dtype;
  });
  return all_alike ? first.dtype : "";
}

std::optional<CodedTensor> LogicalReader::read_codes(const std::string& name) const {
  const std::vector<Piece>& all = pieces(name);
  if (codes_type(name).empty()) return std::nullopt;
  if (all.size() == 1 && is_whole(all[0])) return source_.codes(stored_name(all[0].stored));
  std::optional<CodedTensor> stored;
  CodedTensor logical{.cols = all[0].cols};
  for (const Piece& piece : all) logical.rows += piece.rows;
  std::string in_memory;
  for (const Piece& piece : all) {
    if (piece.stored != in_memory) stored = source_.codes(stored_name(in_memory = piece.stored));
    if (!stored || !is_of_whole_rows(piece, *stored, logical.cols)) return std::nullopt;
    for (int64_t r = 0; r < piece.rows; ++r) copy_row(*stored, piece, r, logical);
  }
  return logical;
}

std::vector<float> LogicalReader::read(const std::string& name) const {
  const MappedTensor* tensor = find(name);
  COTERIE_CHECK(tensor, name + " is not a tensor of this model");
  std::vector<float> logical(tensor->spec.num_elements()), stored;
  std::string in_memory;  // the tensor that `stored` holds: neighbours are often pieces of the same
  for (const Piece& piece : pieces(name)) {
    if (is_whole(piece)) {
      source_.read(stored_name(piece.stored), logical.data() + piece.offset);
      continue;
    }
    if (piece.stored != in_memory) {
      stored.resize(product(piece.stored_shape));
      source_.read(stored_name(piece.stored), stored.data());
      in_memory = piece.stored;
    }
    copy_to_logical(piece, stored.data(), logical.data());
  }
  return logical;
}

void copy_to_logical(const Piece& piece, const float* stored, float* logical) {
  for (int64_t r = 0; r < piece.rows; ++r) {
    const float* from = stored + piece.first + r * piece.row_stride;
    for (int64_t c = 0; c < piece.cols; ++c) logical[piece.offset + r * piece.cols + c] = from[c * piece.col_stride];
  }
}

void copy_to_stored(const Piece& piece, const float* logical, float* stored) {
  for (int64_t r = 0; r < piece.rows; ++r) {
    float* to = stored + piece.first + r * piece.row_stride;
    for (int64_t c = 0; c < piece.cols; ++c) to[c * piece.col_stride] = logical[piece.offset + r * piece.cols + c];
  }
}

}  // namespace coterie
