#include "coterie/error.h"
#include "fuzz_target.h"
#include "io/ggml_type.h"
#include "io/gguf.h"
#include "io/test_gguf.h"
#include "memory_file.h"
#include "model/gguf_model.h"
#include "read_everything.h"

// What the file says of a model, where it says so.
void read_model(const coterie::GgufSource& source) {
  try {
    const coterie::ModelConfig config = coterie::config_from_gguf(source);
    if (config.num_parameters() > 1e6) return;  // a table of all experts would be larger than the file
    coterie::LogicalReader(source, coterie::map_of_gguf(source, config));
  } catch (const coterie::InvalidArgument&) {
  }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const coterie::MemoryFile file(data, size);
  try {
    const coterie::GgufSource source(file.path());
    coterie::read_everything(source);
    for (const coterie::StoredTensor& tensor : source.tensors()) source.codes(tensor.name);
    read_model(source);
  } catch (const coterie::CorruptFile&) {
  }
  return 0;
}

// A model of one layer; its experts' sizes don't fit.
std::string small_model() {
  using namespace coterie::gguf_file;
  const auto integer = [](const std::string& key, uint32_t v) { return value("llama." + key, kUint32, v); };
  Parts parts;
  parts.values = {text_value("general.architecture", "llama"),
                  integer("block_count", 1),
                  integer("context_length", 16),
                  integer("embedding_length", 4),
                  integer("feed_forward_length", 2),
                  integer("attention.head_count", 2),
                  integer("expert_count", 3),
                  integer("expert_used_count", 1),
                  value("llama.attention.layer_norm_rms_epsilon", kFloat32, 1e-6f)};
  parts.values.push_back(str("tokenizer.ggml.tokens") + le(kArray) + le(kString) + le(uint64_t{2}) + str("<|end|>") +
                         str("a"));
  parts.values.push_back(str("tokenizer.ggml.token_type") + le(kArray) + le(kInt32) + le(uint64_t{2}) + le(int32_t{3}) +
                         le(int32_t{1}));
  parts.values.push_back(str("tokenizer.ggml.eos_token_ids") + le(kArray) + le(kUint32) + le(uint64_t{1}) +
                         le(uint32_t{1}));
  parts.tensors = {tensor("token_embd.weight", {4, 3}, kF32, 0), tensor("output_norm.weight", {4}, kF32, 0),
                   tensor("blk.0.attn_q.weight", {4, 4}, kF32, 0)};
  parts.data = std::string(64, '\0');
  return parts.bytes();
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
  Parts part;  // of several files
  part.values = {value("split.no", kUint16, uint16_t{0}), value("split.count", kUint16, uint16_t{2}),
                 value("split.tensors.count", kInt32, int32_t{0})};
  std::vector<std::string> files = {Parts{}.bytes(), metadata.bytes(), part.bytes(), small_model()};
  for (const uint32_t id : {0u, 1u, 2u, 3u, 6u, 7u, 8u, 10u, 11u, 12u, 13u, 14u, 20u, 23u, 30u, 39u}) {
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
