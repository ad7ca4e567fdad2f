// What packed weights take, against the matrices themselves.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "io/test_files.h"
#include "model/architectures.h"
#include "model/quantized_source.h"
#include "model/stored_model.h"
#include "model/test_model.h"

namespace coterie {
namespace {

class WeightsTest : public TemporaryDirectoryTest {};

// Whole panels of every ISA, so that nothing is filled up.
ModelConfig whole_config() {
  ModelConfig c = small_config();
  c.vocab_size = 128, c.hidden_size = 64, c.num_heads = 4, c.num_kv_heads = 2, c.head_dim = 16;
  c.layers.resize(2);
  c.layers[0].intermediate_size = 96;
  c.layers[1].expert_intermediate_size = 32;
  return c;
}

int64_t bytes_of_matrices(ModelWeights weights) {
  int64_t bytes = 0;
  visit_matrices(weights, [&](const PackedMatrix& matrix) { bytes += static_cast<int64_t>(matrix.bytes()); });
  return bytes;
}

TEST_F(WeightsTest, TakeWhatWasForetold) {
  NativeThreadPool pool(2);
  for (const bool tied : {false, true}) {
    ModelConfig config = whole_config();
    config.tie_word_embeddings = tied;
    const std::string path = (directory() / (tied ? "tied" : "untied")).string();
    write_random_model(path, config);
    const StoredModel model(path);
    for (const char* dtype : {"fp32", "bf16", "int8", "int4"}) {
      const WeightTypes types = weight_types(dtype);
      EXPECT_EQ(packed_bytes(config, model.tensors(), types),
                bytes_of_matrices(load_weights(config, model.tensors(), types, pool)))
          << dtype << (tied ? ", tied" : "");
    }
  }
}

// A file whose experts are said to lie in MXFP4.
class Mxfp4Experts : public TensorSource {
 public:
  explicit Mxfp4Experts(const TensorSource& file) : file_(file), tensors_(file.tensors()) {
    for (StoredTensor& tensor : tensors_) {
      if (tensor.name.find(".experts.") != std::string::npos) tensor.dtype = "MXFP4", tensor.has_codes = true;
    }
  }
  const std::string& path() const override { return file_.path(); }
  const std::vector<StoredTensor>& tensors() const override { return tensors_; }
  const StoredTensor* find(const std::string& name) const override {
    for (const StoredTensor& tensor : tensors_) {
      if (tensor.name == name) return &tensor;
    }
    return nullptr;
  }
  void read(const std::string& name, float* out) const override { file_.read(name, out); }

 private:
  const TensorSource& file_;
  std::vector<StoredTensor> tensors_;
};

TEST_F(WeightsTest, ExpertsInMxfp4TakeFourBits) {
  const ModelConfig config = whole_config();
  write_random_model(directory(), config);
  const std::unique_ptr<TensorSource> file = open_tensors(directory().string());
  const Mxfp4Experts source(*file);
  const CheckpointMap map = kCoterieArchitecture.checkpoint_map(config);
  const LogicalReader plain(*file, map), coded(source, map);
  const auto bytes = [&](const LogicalReader& reader, const char* dtype) {
    return packed_bytes(config, reader, weight_types(dtype));
  };
  EXPECT_EQ(bytes(coded, "fp32"), bytes(plain, "fp32"));
  // Rows of 64 elements of up, of 32 of down: codes of 8 or 4 bits, and 2 bytes for each 64 or 32 of them.
  const int64_t up = (64 + 2) - (32 + 2 * 2), down = (32 + 2) - (16 + 2);
  EXPECT_EQ(bytes(plain, "int8") - bytes(coded, "int8"), config.layers[1].router.num_experts * 64 * (up + down));
}

}  // namespace
}  // namespace coterie
