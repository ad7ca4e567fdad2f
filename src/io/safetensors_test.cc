#include "io/safetensors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "coterie/error.h"
#include "io/test_files.h"

namespace coterie {
namespace {

std::vector<float> read_all(const TensorSource& source, const std::string& name) {
  const StoredTensor* tensor = source.find(name);
  if (!tensor) throw std::logic_error("no tensor " + name);
  std::vector<float> values(static_cast<size_t>(tensor->num_elements()));
  source.read(name, values.data());
  return values;
}

// A file from its parts: header length, header, data.
std::string file_bytes(const std::string& header, size_t data_bytes) {
  std::string bytes(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + std::string(data_bytes, '\x01');
}

class SafetensorsTest : public TemporaryDirectoryTest {
 protected:
  // The message of opening these bytes, with the file's path cut off; empty when it opens.
  std::string message_of(const std::string& bytes) {
    const std::string path = write("hostile.safetensors", bytes);
    return corrupt_message([&] { SafetensorsSource{path}; }, path);
  }
};

TEST_F(SafetensorsTest, RoundTripKeepsNamesShapesValuesAndMetadata) {
  const std::vector<float> f32 = {1.5f, -0.0f, 3e38f, NAN, INFINITY, 1e-40f};
  const std::vector<BFloat16> bf16 = {to_bfloat16(1.0f), to_bfloat16(-2.5f), to_bfloat16(1e-30f)};
  const std::vector<uint16_t> f16 = {0x3c00, 0x0001, 0xfc00, 0x7bff};  // 1, least subnormal, -inf, 65504
  const std::vector<int64_t> i64 = {-1, INT64_MAX};
  const std::vector<int8_t> i8 = {-128, 127, 0};
  const std::vector<TensorToWrite> tensors = {
      {"odd bytes", {3}, DType::kI8, i8.data()},      {"layer.0.weight", {2, 3}, DType::kF32, f32.data()},
      {"b\u00e9", {3, 1}, DType::kBF16, bf16.data()}, {"half", {2, 2}, DType::kF16, f16.data()},
      {"steps", {2}, DType::kI64, i64.data()},        {"scalar", {}, DType::kF32, f32.data()},
      {"empty", {0, 5}, DType::kF32, nullptr},
  };
  const std::string path = (directory() / "a.safetensors").string();
  write_safetensors(path, tensors, {{"format", "pt"}, {"note", "a \"quoted\" line\n"}});
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));

  const SafetensorsSource source(path);
  EXPECT_EQ(source.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"note", "a \"quoted\" line\n"}}));
  ASSERT_EQ(source.tensors().size(), tensors.size());
  for (const TensorToWrite& written : tensors) {
    const StoredTensor* stored = source.find(written.name);
    ASSERT_TRUE(stored) << written.name;
    EXPECT_EQ(stored->shape, written.shape);
    EXPECT_EQ(stored->bytes, static_cast<size_t>(stored->num_elements()) * dtype_size(written.dtype));
    const std::span<const std::byte> raw = source.raw(written.name);
    ASSERT_EQ(raw.size(), stored->bytes);
    EXPECT_TRUE(raw.empty() || std::memcmp(raw.data(), written.data, raw.size()) == 0) << written.name;
    // Wider dtypes first, so that every element is aligned in the mapped file.
    EXPECT_EQ(reinterpret_cast<uintptr_t>(raw.data()) % dtype_size(written.dtype), 0u) << written.name;
  }
  EXPECT_EQ(read_all(source, "layer.0.weight")[0], 1.5f);
  EXPECT_TRUE(std::isnan(read_all(source, "layer.0.weight")[3]));
  EXPECT_EQ(read_all(source, "b\u00e9"), (std::vector<float>{1.0f, -2.5f, to_float(to_bfloat16(1e-30f))}));
  EXPECT_EQ(read_all(source, "half"), (std::vector<float>{1.0f, 0x1p-24f, -INFINITY, 65504.0f}));
  EXPECT_EQ(source.find("absent"), nullptr);
}

TEST_F(SafetensorsTest, DataBeginsAtAMultipleOf64Bytes) {
  for (size_t padding = 0; padding < 70; ++padding) {
    const float value = 1.0f;
    const std::string path = (directory() / "a.safetensors").string();
    write_safetensors(path, std::vector<TensorToWrite>{{std::string(padding + 1, 'x'), {}, DType::kF32, &value}});
    const std::string bytes = read_text_file(path);
    uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    EXPECT_EQ((8 + length) % 64, 0u);
    EXPECT_EQ(bytes.size(), 8 + length + 4);
  }
}

TEST_F(SafetensorsTest, ReadRefusesWhatIsNotThereOrNotFloating) {
  const int64_t step = 3;
  const std::string path = (directory() / "a.safetensors").string();
  write_safetensors(path, std::vector<TensorToWrite>{{"step", {}, DType::kI64, &step}});
  const SafetensorsSource source(path);
  float out = 0;
  EXPECT_EQ(invalid_message([&] { source.read("step", &out); }, path),
            ": tensor 'step': dtype: I64 is not one of F32, F16, BF16");
  EXPECT_EQ(invalid_message([&] { source.read("stop", &out); }, path), ": there is no tensor 'stop'");
}

TEST_F(SafetensorsTest, WriterRefusesNamesThatTheFormatCannotHold) {
  const float value = 1.0f;
  const std::string path = (directory() / "a.safetensors").string();
  const TensorToWrite good{"w", {}, DType::kF32, &value};
  const TensorToWrite reserved{"__metadata__", {}, DType::kF32, &value};
  const TensorToWrite bad_utf8{"\xff", {}, DType::kF32, &value};
  const TensorToWrite negative{"w", {-1}, DType::kF32, &value};
  const auto refusal = [&](std::vector<TensorToWrite> tensors) {
    return invalid_message([&] { write_safetensors(path, tensors); }, path);
  };
  EXPECT_EQ(refusal({good, good}), ": tensor name 'w' is taken");
  EXPECT_EQ(refusal({reserved}), ": tensor name '__metadata__' is taken");
  EXPECT_EQ(refusal({bad_utf8}), ": a tensor name or the metadata is not UTF-8");
  EXPECT_EQ(refusal({negative}), ": tensor 'w': shape: -1 is negative or too large");
  EXPECT_TRUE(std::filesystem::is_empty(directory()));
}

TEST_F(SafetensorsTest, AFailedWriteLeavesTheOldFileAndNoRest) {
  const std::string path = write("a.safetensors", "old");
  {
    AtomicFile file(path);
    file.write("new", 3);
    EXPECT_EQ(read_text_file(path), "old");
    EXPECT_TRUE(std::filesystem::exists(path + ".tmp"));
  }
  EXPECT_EQ(read_text_file(path), "old");
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  write_text_file(path, "new");
  EXPECT_EQ(read_text_file(path), "new");
  const std::string nowhere = (directory() / "absent" / "a.txt").string();
  EXPECT_EQ(invalid_message([&] { write_text_file(nowhere, "x"); }, nowhere),
            ".tmp: cannot create: No such file or directory");
}

TEST_F(SafetensorsTest, AFullDiskIsResourceExhausted) {
  // The temporary file is a link to the device that is always full.
  const std::string path = (directory() / "full").string();
  std::filesystem::create_symlink("/dev/full", path + ".tmp");
  EXPECT_EQ(message<ResourceExhausted>([&] { write_text_file(path, "x"); }, path),
            ".tmp: cannot write: No space left on device");
}

TEST_F(SafetensorsTest, HostileFilesAreRefusedByFieldAndValue) {
  const auto tensor = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  const auto f32 = [&](const std::string& shape, const std::string& offsets) {
    return tensor("\"dtype\":\"F32\",\"shape\":" + shape + ",\"data_offsets\":" + offsets);
  };
  struct Case {
    std::string bytes, message;
  };
  const std::string length_only = file_bytes("", 0);
  std::string huge = file_bytes("{}", 0), beyond = file_bytes("{}", 0);
  huge.replace(0, 8, std::string(8, '\xff'));
  beyond[0] = 3;
  const std::string two = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                          R"("b":{"dtype":"U8","shape":[4],"data_offsets":)";
  const Case cases[] = {
      {"", ": 0 bytes, too short for a header length"},
      {"1234567", ": 7 bytes, too short for a header length"},
      {huge, ": header: length 18446744073709551615 exceeds 100000000"},
      {beyond, ": header: length 3 exceeds the file of 10 bytes"},
      {length_only, ": header: does not begin with '{'"},
      {file_bytes("[]", 0), ": header: does not begin with '{'"},
      {file_bytes("{", 0), ": header: invalid JSON at byte 1"},
      {file_bytes("{} x", 0), ": header: invalid JSON at byte 3"},
      {file_bytes(std::string("{}\0{", 4), 0), ": header: invalid JSON at byte 2"},
      {file_bytes("{\"\xff\":1}", 0), ": header: invalid JSON at byte 2"},
      {file_bytes(R"({"w":{},"w":{}})", 0), ": header: key 'w' occurs twice"},
      {file_bytes("{\"w\":" + std::string(5, '['), 0), ": header: JSON nested deeper than 4"},
      {file_bytes(R"({"w":1e999})", 0), ": header: a JSON number is too large"},
      {file_bytes(R"({"w":3})", 0), ": tensor 'w' is not an object"},
      {file_bytes(R"({"a\nb":3})", 0), R"(: tensor 'a\x0ab' is not an object)"},
      {file_bytes("{\"" + std::string(121, 'x') + "\":3}", 0),
       ": tensor '" + std::string(120, 'x') + "...' is not an object"},
      {file_bytes(R"({"__metadata__":[]})", 0), ": __metadata__ is not an object"},
      {file_bytes(R"({"__metadata__":{"k":1}})", 0), ": __metadata__: 'k' is not a string"},
      {file_bytes(tensor(R"("shape":[],"data_offsets":[0,4])"), 4), ": tensor 'w': dtype: is missing"},
      {file_bytes(tensor(R"("dtype":5,"shape":[],"data_offsets":[0,4])"), 4), ": tensor 'w': dtype: is not a string"},
      {file_bytes(tensor(R"("dtype":"F31","shape":[],"data_offsets":[0,4])"), 4),
       ": tensor 'w': dtype: 'F31' is not known"},
      {file_bytes(tensor(R"("dtype":"F4","shape":[3],"data_offsets":[0,2])"), 2),
       ": tensor 'w': shape: 12 bits are not whole bytes"},
      {file_bytes(f32("4", "[0,4]"), 4), ": tensor 'w': shape: is not an array"},
      {file_bytes(f32("[-1]", "[0,4]"), 4), ": tensor 'w': shape: holds '-1', not a whole number of 0 to 2^63 - 1"},
      {file_bytes(f32("[1.0]", "[0,4]"), 4), ": tensor 'w': shape: holds '1.0', not a whole number of 0 to 2^63 - 1"},
      {file_bytes(f32("[9223372036854775808]", "[0,4]"), 4),
       ": tensor 'w': shape: holds '9223372036854775808', not a whole number of 0 to 2^63 - 1"},
      {file_bytes(f32("[4294967296,4294967296]", "[0,0]"), 0), ": tensor 'w': shape: product exceeds 2^63 - 1"},
      {file_bytes(f32("[0,4294967296,4294967296]", "[0,0]"), 0), ": tensor 'w': shape: product exceeds 2^63 - 1"},
      {file_bytes(f32("[4611686018427387905]", "[0,4]"), 4), ": tensor 'w': shape: number of bits exceeds 2^64 - 1"},
      {file_bytes(f32("[1]", "[0,4,8]"), 4), ": tensor 'w': data_offsets: 3 numbers, not 2"},
      {file_bytes(f32("[1]", "[4,0]"), 4), ": tensor 'w': data_offsets: begins at 4, after its end 0"},
      {file_bytes(f32("[2]", "[0,4]"), 4), ": tensor 'w': data_offsets: span 4 bytes, but shape and dtype need 8"},
      {file_bytes(f32("[1]", "[0,4]"), 3), ": tensors cover 4 bytes, but the file holds 3"},
      {file_bytes(f32("[1]", "[0,4]"), 5), ": tensors cover 4 bytes, but the file holds 5"},
      {file_bytes(f32("[1]", "[1,5]"), 5),
       ": tensor 'w': data_offsets: begins at 1, a hole: the bytes before end at 0"},
      {file_bytes(two + "[3,7]}}", 7),
       ": tensor 'b': data_offsets: begins at 3, an overlap: the bytes before end at 4"},
      {file_bytes(two + "[5,9]}}", 9), ": tensor 'b': data_offsets: begins at 5, a hole: the bytes before end at 4"},
  };
  for (const Case& c : cases) EXPECT_EQ(message_of(c.bytes), c.message);
  EXPECT_EQ(message_of(file_bytes("{}", 0)), "");
  EXPECT_EQ(message_of(file_bytes("{}  \n", 0)), "");
  EXPECT_EQ(message_of(file_bytes(f32("[4294967296,0]", "[0,0]"), 0)), "");
}

TEST_F(SafetensorsTest, EveryTruncationIsRefused) {
  const std::vector<float> values(6, 1.0f);
  const std::string path = (directory() / "a.safetensors").string();
  write_safetensors(path, std::vector<TensorToWrite>{{"a", {2}, DType::kF32, values.data()},
                                                     {"b", {2, 2}, DType::kF32, values.data()}});
  const std::string whole = read_text_file(path);
  for (size_t size = 0; size < whole.size(); ++size) EXPECT_NE(message_of(whole.substr(0, size)), "") << size;
}

TEST_F(SafetensorsTest, AMissingFileOrAnEmptyDirectoryIsTheCallersMistake) {
  const std::string absent = (directory() / "absent.safetensors").string();
  EXPECT_EQ(invalid_message([&] { SafetensorsSource{absent}; }, absent), ": No such file or directory");
  const std::string path = directory().string();
  EXPECT_EQ(invalid_message([&] { SafetensorsSource{path}; }, path),
            ": holds neither model.safetensors nor model.safetensors.index.json");
}

class ShardsTest : public SafetensorsTest {
 protected:
  void SetUp() override {
    SafetensorsTest::SetUp();
    const float a = 1.0f, b = 2.0f;
    write_safetensors((directory() / "1.safetensors").string(), std::vector<TensorToWrite>{{"a", {}, DType::kF32, &a}},
                      {{"format", "pt"}});
    write_safetensors((directory() / "2.safetensors").string(), std::vector<TensorToWrite>{{"b", {}, DType::kF32, &b}});
  }

  std::string message_of_index(const std::string& text) {
    const std::string path = write("model.safetensors.index.json", text);
    return corrupt_message([&] { SafetensorsSource{directory().string()}; }, path);
  }
};

TEST_F(ShardsTest, AllShardsOfAnIndexAreOneSource) {
  EXPECT_EQ(message_of_index(R"({"metadata":{"total_size":8},"weight_map":{"b":"2.safetensors","a":"1.safetensors"}})"),
            "");
  const SafetensorsSource source(directory().string());
  ASSERT_EQ(source.tensors().size(), 2u);
  EXPECT_EQ(source.tensors()[0].name, "a");
  EXPECT_EQ(read_all(source, "a"), std::vector<float>{1.0f});
  EXPECT_EQ(read_all(source, "b"), std::vector<float>{2.0f});
  EXPECT_EQ(source.metadata().at("format"), "pt");
}

TEST_F(ShardsTest, AHostileIndexIsRefused) {
  const auto map = [](const std::string& entries) { return "{\"weight_map\":{" + entries + "}}"; };
  const std::string a = R"("a":"1.safetensors")", b = R"("b":"2.safetensors")";
  struct Case {
    std::string index, message;
  };
  const Case cases[] = {
      {"", ": invalid JSON at byte 0"},
      {"{}", ": weight_map: not an object"},
      {"[1]", ": weight_map: not an object"},
      {map(""), ": weight_map: is empty"},
      {map(R"("a":1)"), ": weight_map: 'a': is not a string"},
      {map(R"("a":"../1.safetensors")"), ": weight_map: 'a': '../1.safetensors' is not a plain file name"},
      {map(R"("a":"/etc/passwd")"), ": weight_map: 'a': '/etc/passwd' is not a plain file name"},
      {map(R"("a":"..")"), ": weight_map: 'a': '..' is not a plain file name"},
      {map(R"("a":"")"), ": weight_map: 'a': '' is not a plain file name"},
      {map(R"("a":"1.safetensors\u0000x")"), R"(: weight_map: 'a': '1.safetensors\x00x' is not a plain file name)"},
      {map(a + "," + a), ": key 'a' occurs twice"},
      {map(a + R"(,"b":"3.safetensors")"), ": weight_map: shard '3.safetensors' is missing"},
      {map(a + R"(,"b":"1.safetensors")"), ": weight_map: 'b' is not in its shard '1.safetensors'"},
      {map(R"("a":"2.safetensors",)" + b), ": weight_map: 'a' is not in its shard '2.safetensors'"},
      {map(a + "," + R"("c":"2.safetensors")"), ": weight_map: 'b' is in shard '2.safetensors', but listed nowhere"},
      {map(R"("b":"1.safetensors","a":"1.safetensors","c":"2.safetensors")"),
       ": weight_map: 'b' is in shard '2.safetensors', but listed in '1.safetensors'"},
  };
  for (const Case& c : cases) EXPECT_EQ(message_of_index(c.index), c.message);
}

}  // namespace
}  // namespace coterie
