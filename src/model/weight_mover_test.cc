#include "model/weight_mover.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "coterie/error.h"
#include "io/test_files.h"
#include "kernels/kernel_table.h"
#include "model/stored_model.h"
#include "model/test_model.h"

namespace coterie {
namespace {

class WeightMoverTest : public TemporaryDirectoryTest {};

std::vector<std::string> panels_of(ModelWeights& weights) {
  std::vector<std::string> panels;
  visit_matrices(weights, [&](PackedMatrix& m) { panels.emplace_back(static_cast<const char*>(m.data()), m.bytes()); });
  return panels;
}

TEST_F(WeightMoverTest, WeightsAreTheSameInTheirNewPlace) {
  NativeThreadPool pool(2);
  for (const ModelConfig& config : {small_config(), latent_config()}) {
    const std::string path = (directory() / std::to_string(config.is_latent())).string();
    write_random_model(path, config);
    const StoredModel model(path);
    const WeightTypes types = weight_types("int8");
    ModelWeights packed = load_weights(config, model.tensors(), types, pool);
    ModelWeights weights = load_weights(config, model.tensors(), types, pool, weight_cache(path, types.description()));
    const void* const mapped = weights.head.weight_NK.data();
    EXPECT_EQ(panels_of(weights), panels_of(packed));
    {
      WeightMover never(weights);
    }  // stopped before it is done: nothing happens
    WeightMover mover(weights);
    while (!mover.move_if_ready()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_NE(weights.head.weight_NK.data(), mapped);
    EXPECT_EQ(panels_of(weights), panels_of(packed));
  }
}

// Matrices in bf16 are compact where they can be; a second start knows which ones are by their names.
TEST_F(WeightMoverTest, CompactMatricesAreFoundInTheFile) {
  NativeThreadPool pool(2);
  const ModelConfig config = small_config();
  std::vector<std::vector<float>> values;
  std::vector<TensorToWrite> tensors;
  for (const TensorSpec& spec : logical_tensors(config)) {
    values.push_back(random_values(spec.num_elements(), values.size(), 0.5f));
    if (spec.name == "lm_head.weight") {  // many of them too small
      for (size_t i = 0; i < values.back().size(); i += 3) values.back()[i] *= 1e-9f;
    }
    tensors.push_back({spec.name, spec.shape, DType::kF32, values.back().data()});
  }
  write_safetensors((directory() / "model.safetensors").string(), tensors);
  write_text_file((directory() / "config.json").string(), config.to_json());
  const StoredModel model(directory().string());
  const WeightTypes types = weight_types("bf16");
  const WeightCache cache = weight_cache(directory().string(), types.description());
  ModelWeights packed = load_weights(config, model.tensors(), types, pool);
  ModelWeights first = load_weights(config, model.tensors(), types, pool, cache);
  ModelWeights second = load_weights(config, model.tensors(), types, pool, cache);
  EXPECT_FALSE(packed.head.weight_NK.shape().compact);
  EXPECT_EQ(packed.layers[1].experts.up_E[0].shape().compact, active_kernels().compact_pays);
  EXPECT_EQ(packed.layers[0].q.weight_NK.shape().compact, active_kernels().compact_pays);
  EXPECT_TRUE(panels_of(first) == panels_of(packed));
  EXPECT_TRUE(panels_of(second) == panels_of(packed));
}

TEST_F(WeightMoverTest, GoesWithoutAFileWhereADirectoryStands) {
  NativeThreadPool pool(1);
  write_random_model(directory(), small_config());
  const StoredModel model(directory().string());
  WeightCache cache = weight_cache(directory().string(), "int4");
  std::filesystem::create_directories(std::filesystem::path(cache.path) / "inside");
  const ModelWeights weights = load_weights(small_config(), model.tensors(), weight_types("int4"), pool, cache);
  EXPECT_EQ(dynamic_cast<const FileStore*>(weights.store.get()), nullptr);
  cache.required = true;
  EXPECT_THROW(load_weights(small_config(), model.tensors(), weight_types("int4"), pool, cache), InvalidArgument);
}

TEST_F(WeightMoverTest, LeavesNothingOfProcessesThatWereKilled) {
  NativeThreadPool pool(1);
  write_random_model(directory(), small_config());
  const StoredModel model(directory().string());
  const WeightTypes types = weight_types("int4");
  const WeightCache cache = weight_cache(directory().string(), types.description());
  const std::string prefix = std::filesystem::path(cache.path).filename().string() + ".";
  write(prefix + "999999999.tmp", "half a file");
  write(prefix + std::to_string(getppid()) + ".tmp", "a living process is at it");
  load_weights(small_config(), model.tensors(), types, pool, cache);
  EXPECT_FALSE(std::filesystem::exists(directory() / (prefix + "999999999.tmp")));
  EXPECT_TRUE(std::filesystem::exists(directory() / (prefix + std::to_string(getppid()) + ".tmp")));
  EXPECT_TRUE(std::filesystem::exists(cache.path));
}

}  // namespace
}  // namespace coterie
