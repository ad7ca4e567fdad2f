#include "model/random_source.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "coterie/error.h"
#include "io/atomic_file.h"
#include "io/test_files.h"
#include "model/architectures.h"
#include "model/stored_model.h"
#include "model/test_model.h"

namespace coterie {
namespace {

using RandomSourceTest = TemporaryDirectoryTest;

RandomSource source_of(const ModelConfig& config) {
  return RandomSource("DIR", architecture_named(config.architecture, "DIR").checkpoint_map(config));
}

std::vector<float> read(const RandomSource& source, const std::string& name) {
  std::vector<float> values(source.find(name)->num_elements());
  source.read(name, values.data());
  return values;
}

TEST_F(RandomSourceTest, HasWhatTheConfigurationAsksFor) {
  const ModelConfig config = small_config();
  const RandomSource source = source_of(config);
  int64_t elements = 0;
  for (const StoredTensor& tensor : source.tensors()) elements += tensor.num_elements();
  EXPECT_EQ(elements, config.num_parameters());
  EXPECT_EQ(source.find("nothing"), nullptr);
  float value = 0;
  EXPECT_EQ(invalid_message([&] { source.read("nothing", &value); }, ""), "DIR: nothing: no such tensor");
}

TEST_F(RandomSourceTest, KeepsTheSizeOfWhatIsMultiplied) {
  ModelConfig config = small_config();
  config.vocab_size = 9000;  // several blocks
  const RandomSource source = source_of(config);
  const std::vector<float> norm = read(source, "model.norm.weight");
  EXPECT_TRUE(std::ranges::all_of(norm, [](float x) { return x == 1.0f; }));
  const std::vector<float> weights = read(source, "model.embed_tokens.weight");
  double sum = 0, squares = 0;
  for (const float x : weights) {
    sum += x;
    squares += static_cast<double>(x) * x;
  }
  const double n = static_cast<double>(weights.size()), variance = 1.0 / static_cast<double>(config.hidden_size);
  // 65521 = 256^2 different numbers: one standard error is deviation / 256 of the mean, and 2^0.5 / 256 of the variance
  // of itself. Five of them.
  EXPECT_NEAR(sum / n, 0.0, 5 * std::sqrt(variance) / 256);
  EXPECT_NEAR(squares / n, variance, 5 * variance * std::sqrt(2.0) / 256);
  EXPECT_EQ(weights, read(source_of(config), "model.embed_tokens.weight"));
}

TEST_F(RandomSourceTest, NoTwoRowsAreAlike) {
  const ModelConfig config = small_config();
  const std::vector<float> weights = read(source_of(config), "model.embed_tokens.weight");
  const int64_t D = config.hidden_size;
  for (int64_t a = 0; a < config.vocab_size; ++a) {
    for (int64_t b = 0; b < a; ++b) {
      EXPECT_FALSE(std::equal(&weights[a * D], &weights[a * D] + D, &weights[b * D])) << a << ", " << b;
    }
  }
}

TEST_F(RandomSourceTest, StandsForTheFilesOfADirectory) {
  write_text_file((directory() / "config.json").string(), small_config().to_json());
  const StoredModel model(directory().string(), LoadFormat::kDummy);
  EXPECT_EQ(model.tensors().read("model.norm.weight").front(), 1.0f);
  EXPECT_NE(invalid_message([&] { StoredModel(directory().string()); }, ""), "");
  EXPECT_EQ(invalid_message([] { StoredModel("x.gguf", LoadFormat::kDummy); }, ""),
            "load_format: 'dummy' needs a directory with a config.json, not x.gguf");
}

}  // namespace
}  // namespace coterie
