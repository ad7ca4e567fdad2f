#include <cstring>

#include "fuzz_target.h"
#include "io/safetensors.h"
#include "memory_file.h"
#include "read_everything.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const coterie::MemoryFile file(data, size);
  try {
    coterie::read_everything(coterie::SafetensorsSource(file.path()));
  } catch (const coterie::CorruptFile&) {
  }
  return 0;
}

std::vector<std::string> seeds() {
  const auto file = [](const std::string& header, size_t data_bytes) {
    std::string bytes(sizeof(uint64_t), '\0');
    const uint64_t length = header.size();
    std::memcpy(bytes.data(), &length, sizeof(length));
    return bytes + header + std::string(data_bytes, '\x3f');
  };
  return {
      file("{}", 0),
      file(R"({"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}  )", 8),
      file(
          R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[3],"data_offsets":[4,10]},)"
          R"("b\u00e9":{"dtype":"I64","shape":[],"data_offsets":[10,18]},)"
          R"("c":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},"d":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}})",
          18),
      file(R"({"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}})", 2),
  };
}
