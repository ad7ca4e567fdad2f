// The tensor types of GGUF files: how their blocks are stored, and how those that we read become fp32.
// The layouts are ggml's (https://github.com/ggml-org/ggml, docs/gguf.md of the same project).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace coterie {

struct GgmlType {
  uint32_t id = 0;
  const char* name = nullptr;
  int64_t block_elements = 1;  // elements that share one block, along the innermost dimension
  size_t block_bytes = 0;

  // num_blocks blocks (no alignment needed) to num_blocks * block_elements floats; null for a type
  // that is only listed.
  void (*dequantize)(const std::byte* blocks, int64_t num_blocks, float* out) = nullptr;
};

const GgmlType* find_ggml_type(uint32_t id);  // null for an id that ggml does not define

std::string readable_ggml_types();  // "F32, F16, Q4_0, ...", for messages

}  // namespace coterie
