// manifest.json of a checkpoint: whatever is accepted must survive its own round trip, pieces that cover their tensor
// have as many elements as it, and the order of its elements has each of them once.
#include <cstdlib>
#include <vector>

#include "coterie/error.h"
#include "fuzz_target.h"
#include "io/checkpoint_manifest.h"

namespace {

// Of a tensor of few elements.
void check_order(const coterie::ElementOrder& order, int64_t elements) {
  if (elements > 1000) return;
  std::vector<bool> seen(static_cast<size_t>(elements));
  coterie::for_each_run(order, elements, 0, elements, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      if (i >= elements || seen[static_cast<size_t>(i)]) std::abort();
      seen[static_cast<size_t>(i)] = true;
    }
  });
}

}  // namespace

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
      check_order(tensor.order, elements);
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
      R"({"format":1,"state":{},"tensors":{"w":{"dtype":"F32","shape":[2,6],"element_order":{"row":6,"run":2},"pieces":[)"
      R"({"file":"a.safetensors","first":0,"count":12,"crc32":0}]}}})",
  };
}
