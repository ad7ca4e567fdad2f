// One GGUF file (version 2 and 3, little endian) as it lies: its metadata, and where each tensor is. A model is one
// such file or several, see gguf.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/memory.h"
#include "io/ggml_type.h"
#include "io/tensor_source.h"

namespace coterie {

// A metadata value; numbers are widened.
using GgufValue = std::variant<int64_t, double, bool, std::string, std::vector<int64_t>, std::vector<double>,
                               std::vector<std::string>>;

struct GgufTensor {
  StoredTensor stored;
  const GgmlType* type = nullptr;
  uint64_t offset = 0;  // from the start of the data
};

struct GgufFile {
  // Hostile files end in CorruptFile naming file, field and value.
  explicit GgufFile(const std::string& path);

  const std::string& path() const { return mapped.path(); }
  const GgufValue* find_metadata(const std::string& key) const;  // null when absent
  const std::byte* blocks_of(const GgufTensor& tensor) const {
    return mapped.bytes().data() + data_start + tensor.offset;
  }

  MappedFile mapped;
  std::vector<std::pair<std::string, GgufValue>> metadata;  // each key once
  std::vector<GgufTensor> tensors;                          // each name once; in the order of the file's list
  size_t data_start = 0;
};

}  // namespace coterie
