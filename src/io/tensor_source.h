// Named tensors in files, whatever the format. Implementations map the files; reading is safe from
// any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace coterie {

// The product of the dims (none negative), or nothing when even that of the non-zero ones exceeds
// int64: a zero must not hide that some partial product overflows.
inline std::optional<int64_t> checked_num_elements(std::span<const int64_t> shape) {
  int64_t product = 1;
  bool empty = false;
  for (const int64_t dim : shape) {
    empty |= dim == 0;
    if (dim != 0 && __builtin_mul_overflow(product, dim, &product)) return std::nullopt;
  }
  return empty ? 0 : product;
}

struct StoredTensor {
  std::string name;
  std::vector<int64_t> shape;  // outermost first, as PyTorch has it
  std::string dtype;           // as the format names it: "F32", "BF16", "Q4_1", ...
  size_t bytes = 0;            // in the file
  bool has_codes = false;      // TensorSource::codes() gives it

  int64_t num_elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

// A matrix in few bits, as it is stored: row by row in each of its parts, a row of every part being whole bytes. All
// dimensions but the innermost count as rows. What the bytes mean, StoredTensor::dtype says: "MXFP4" (io/mxfp4.h), or
// a type of ours (model/quantized_source.h).
struct CodedTensor {
  int64_t rows = 0, cols = 0;
  std::vector<uint8_t> codes, scales;
  std::vector<uint8_t> minimums, row_factors;  // empty where the type has none
};

class TensorSource {
 public:
  virtual ~TensorSource() = default;

  virtual const std::string& path() const = 0;                          // for messages
  virtual const std::vector<StoredTensor>& tensors() const = 0;         // in file order
  virtual const StoredTensor* find(const std::string& name) const = 0;  // null when absent

  // The whole tensor as fp32 (dequantized where it is quantized) into out, num_elements() long.
  // InvalidArgument when there is no such tensor, or its dtype is not one that we read.
  virtual void read(const std::string& name, float* out) const = 0;

  // Refuses what read() would, before anything is read.
  virtual void check_readable(const std::string&) const {}

  // The tensor without decoding it, where it lies in codes that we keep; else nothing.
  virtual std::optional<CodedTensor> codes(const std::string&) const { return std::nullopt; }
};

}  // namespace coterie
