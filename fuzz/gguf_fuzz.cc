#include "fuzz_target.h"
#include "io/ggml_type.h"
#include "io/gguf.h"
#include "io/test_gguf.h"
#include "memory_file.h"
#include "read_everything.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const coterie::MemoryFile file(data, size);
  try {
    coterie::read_everything(coterie::GgufSource(file.path()));
  } catch (const coterie::CorruptFile&) {
  }
  return 0;
}

std::vector<std::string> seeds() {
  using namespace coterie::gguf_file;
  Parts metadata;
  metadata.version = 2;
  metadata.values = {value("a", kUint8, uint8_t{1}),
                     value("b", kInt16, int16_t{-1}),
                     value("c", kUint64, uint64_t{9}),
                     value("d", kFloat32, 1.0f),
                     value("e", kFloat64, 1.0),
                     value("f", kBool, uint8_t{1}),
                     text_value("g", "text"),
                     str("h") + le(kArray) + le(kInt32) + le(uint64_t{2}) + le(int32_t{1}) + le(int32_t{2}),
                     str("i") + le(kArray) + le(kString) + le(uint64_t{2}) + str("") + str("ab"),
                     str("j") + le(kArray) + le(kFloat32) + le(uint64_t{1}) + le(2.5f)};
  std::vector<std::string> files = {Parts{}.bytes(), metadata.bytes()};
  for (const uint32_t id : {0u, 1u, 2u, 3u, 6u, 8u, 12u, 14u, 30u}) {
    const coterie::GgmlType& type = *coterie::find_ggml_type(id);
    Parts parts;
    parts.alignment = 64;
    parts.values = {value("general.alignment", kUint32, uint32_t{64})};
    parts.tensors = {tensor("w", {static_cast<uint64_t>(type.block_elements), 1}, id, 0), tensor("none", {0}, kF32, 0),
                     tensor("scalar", {}, kF32, 256)};
    parts.data = std::string(type.block_bytes, '\x3f');
    parts.data.resize(256);
    parts.data += le(1.0f);
    files.push_back(parts.bytes());
  }
  return files;
}
