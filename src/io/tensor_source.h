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

  int64_t num_elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

// A matrix in MXFP4 (see io/mxfp4.h), as it is stored. All dimensions but the innermost count as rows.
struct Mxfp4Tensor {
  int64_t rows = 0, cols = 0;   // cols is a multiple of 32
  std::vector<uint8_t> codes;   // [rows, cols / 2]: element 2 i in the low nibble of byte i, 2 i + 1 in the high one
  std::vector<uint8_t> scales;  // [rows, cols / 32], powers of two: 2^(scale - 127)
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

  // The tensor without decoding it, where it lies in MXFP4; else nothing.
  virtual std::optional<Mxfp4Tensor> mxfp4(const std::string&) const { return std::nullopt; }
};

}  // namespace coterie
