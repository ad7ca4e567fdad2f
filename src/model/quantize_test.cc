#include "model/quantize.h"

#include <gtest/gtest.h>

#include <stdexcept>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "io/test_files.h"
#include "model/stored_model.h"
#include "model/test_model.h"

namespace coterie {
namespace {

class QuantizeTest : public TemporaryDirectoryTest {
 protected:
  std::string path(const std::string& name) const { return (directory() / name).string(); }
  bool exists(const std::string& name) const { return std::filesystem::exists(directory() / name); }

  NativeThreadPool pool_{2};
};

TEST_F(QuantizeTest, SeveralFilesHoldWhatOneHolds) {
  write_random_model(path("source"), small_config());
  std::vector<std::pair<int64_t, int64_t>> steps;
  quantize_model(path("source"), path("one"), {.dtype = "int4"}, pool_,
                 [&](int64_t done, int64_t total) { steps.emplace_back(done, total); });
  EXPECT_EQ(steps.size(), logical_tensors(small_config()).size());
  EXPECT_EQ(steps.back().first, steps.back().second);
  EXPECT_TRUE(exists("one/model.safetensors"));

  quantize_model(path("source"), path("many"), {.dtype = "int4", .shard_bytes = 5000}, pool_);
  EXPECT_FALSE(exists("many/model.safetensors"));
  EXPECT_TRUE(exists("many/model.safetensors.index.json"));
  const StoredModel one(path("one")), many(path("many"));
  for (const MappedTensor& tensor : one.tensors().tensors()) {
    EXPECT_EQ(one.tensors().read(tensor.spec.name), many.tensors().read(tensor.spec.name)) << tensor.spec.name;
  }
  for (const auto& entry : std::filesystem::directory_iterator(directory() / "many")) {
    EXPECT_FALSE(entry.path().filename().string().starts_with("coterie-part-")) << entry.path();
    EXPECT_LT(entry.file_size(), 16'000) << entry.path();
  }
}

TEST_F(QuantizeTest, LeavesNothingWhenItIsStoppedAndGoesOnAfterwards) {
  write_random_model(path("source"), small_config());
  const auto stop = [](int64_t done, int64_t total) {
    if (2 * done > total) throw std::runtime_error("stopped");
  };
  const QuantizeOptions options = {.dtype = "int4", .shard_bytes = 5000};
  EXPECT_THROW(quantize_model(path("source"), path("out"), options, pool_, stop), std::runtime_error);
  EXPECT_TRUE(std::filesystem::is_empty(directory() / "out"));
  write("out/coterie-part-7.safetensors", "of a process that was killed");
  quantize_model(path("source"), path("out"), options, pool_);
  EXPECT_FALSE(exists("out/coterie-part-7.safetensors"));
  EXPECT_TRUE(exists("out/config.json"));
}

TEST_F(QuantizeTest, RefusesWhatItCannotDo) {
  write_random_model(path("source"), small_config());
  EXPECT_EQ(invalid_message([&] { quantize_model(path("source"), path("out"), {.dtype = "fp32"}, pool_); }, ""),
            "dtype: 'fp32' is not one of int8, int4, int4_64");
  EXPECT_EQ(invalid_message([&] { quantize_model(path("source"), path("source"), {}, pool_); }, path("source") + ": ")
                .substr(0, 21),
            "holds a model already");
  EXPECT_TRUE(exists("source/model.safetensors"));
}

}  // namespace
}  // namespace coterie
