// manifest.json of a checkpoint: whatever is accepted must survive its own round trip, and pieces that cover their
// tensor have as many elements as it.
#include <cstdlib>

#include "coterie/error.h"
#include "fuzz_target.h"
#include "io/checkpoint_manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    coterie::CheckpointManifest manifest =
        coterie::parse_manifest({reinterpret_cast<const char*>(data), size}, "manifest.json");
    const std::string text = coterie::manifest_text(manifest);
    if (coterie::manifest_text(coterie::parse_manifest(text, "written")) != text) std::abort();
    coterie::check_coverage(manifest, "manifest.json");
    for (const auto& [name, tensor] : manifest.tensors) {
      int64_t elements = 0;
      for (const coterie::CheckpointPiece& piece : tensor.pieces) elements += piece.count;
      if (elements != tensor.num_elements()) std::abort();
    }
  } catch (const coterie::CorruptFile& error) {
    if (std::string(error.what()).starts_with("written")) std::abort();
  }
  return 0;
}

std::vector<std::string> seeds() {
  return {
      R"({"format":1,"state":{},"tensors":{}})",
      R"({"format":1,"state":{"step":3,"order":{"seed":[1.5,null]}},"tensors":{)"
      R"("w":{"dtype":"F32","shape":[2,3],"pieces":[{"file":"a.safetensors","first":4,"count":2,"crc32":4294967295},)"
      R"({"file":"b.safetensors","first":0,"count":4,"crc32":0}]},"\u00e9":{"dtype":"BF16","shape":[0],"pieces":[]}}})",
  };
}
