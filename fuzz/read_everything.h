// Reads every tensor of a source into memory of just its size, so that a sanitizer sees a write past it.
#pragma once

#include <memory>

#include "coterie/error.h"
#include "io/tensor_source.h"

namespace coterie {

inline void read_everything(const TensorSource& source) {
  for (const StoredTensor& tensor : source.tensors()) {
    const auto values = std::make_unique<float[]>(static_cast<size_t>(tensor.num_elements()));
    try {
      source.read(tensor.name, values.get());
    } catch (const InvalidArgument&) {
      // A type that can be listed, not read.
    }
  }
}

}  // namespace coterie
