#include "io/gguf.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "base/philox.h"
#include "coterie/error.h"
#include "io/ggml_type.h"
#include "io/test_files.h"
#include "io/test_gguf.h"

namespace coterie {
namespace {

using namespace gguf_file;

class GgufTest : public TemporaryDirectoryTest {
 protected:
  std::string message_of(const std::string& bytes) {
    const std::string path = write("hostile.gguf", bytes);
    return corrupt_message([&] { GgufSource{path}; }, path);
  }
};

TEST_F(GgufTest, MetadataOfEveryTypeIsWidened) {
  for (const uint32_t version : {2u, 3u}) {
    Parts parts;
    parts.version = version;
    parts.values = {
        value("u8", kUint8, uint8_t{200}),
        value("i8", kInt8, int8_t{-5}),
        value("u16", kUint16, uint16_t{60000}),
        value("i16", kInt16, int16_t{-300}),
        value("u32", kUint32, uint32_t{4000000000u}),
        value("i32", kInt32, int32_t{-70000}),
        value("f32", kFloat32, 0.5f),
        value("bool", kBool, uint8_t{1}),
        text_value("string", "a\nb"),
        value("u64", kUint64, uint64_t{1} << 62),
        value("i64", kInt64, INT64_MIN),
        value("f64", kFloat64, 1e300),
        str("ints") + le(kArray) + le(kInt16) + le(uint64_t{2}) + le(int16_t{-1}) + le(int16_t{7}),
        str("bools") + le(kArray) + le(kBool) + le(uint64_t{2}) + le(uint8_t{1}) + le(uint8_t{0}),
        str("floats") + le(kArray) + le(kFloat32) + le(uint64_t{1}) + le(2.5f),
        str("strings") + le(kArray) + le(kString) + le(uint64_t{2}) + str("") + str("xyz"),
    };
    const GgufSource source(write("a.gguf", parts.bytes()));
    const std::vector<std::pair<std::string, GgufValue>> expected = {
        {"u8", int64_t{200}},
        {"i8", int64_t{-5}},
        {"u16", int64_t{60000}},
        {"i16", int64_t{-300}},
        {"u32", int64_t{4000000000}},
        {"i32", int64_t{-70000}},
        {"f32", 0.5},
        {"bool", true},
        {"string", std::string("a\nb")},
        {"u64", int64_t{1} << 62},
        {"i64", INT64_MIN},
        {"f64", 1e300},
        {"ints", std::vector<int64_t>{-1, 7}},
        {"bools", std::vector<int64_t>{1, 0}},
        {"floats", std::vector<double>{2.5}},
        {"strings", std::vector<std::string>{"", "xyz"}},
    };
    EXPECT_EQ(source.metadata(), expected);
    EXPECT_EQ(*source.find_metadata("f64"), GgufValue(1e300));
    EXPECT_EQ(source.find_metadata("absent"), nullptr);
    EXPECT_TRUE(source.tensors().empty());
  }
}

TEST_F(GgufTest, TensorsAreFoundByNameWithTheirShapeOutermostFirst) {
  Parts parts;
  parts.alignment = 64;
  parts.values = {value("general.alignment", kUint32, uint32_t{64})};
  parts.tensors = {tensor("second", {3, 2}, kF32, 64), tensor("first", {}, kF32, 0), tensor("none", {0, 4}, kF32, 128),
                   tensor("quantized", {256, 1}, kIq2Xs, 128)};
  parts.data = le(1.0f) + std::string(60, '\0');
  for (int i = 0; i < 6; ++i) parts.data += le(static_cast<float>(i));
  parts.data += std::string(64 - 24 + 176, '\0');
  const std::string path = write("a.gguf", parts.bytes());
  const GgufSource source(path);
  ASSERT_EQ(source.tensors().size(), 4u);
  EXPECT_EQ(source.tensors()[0].name, "second");
  EXPECT_EQ(source.tensors()[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(source.tensors()[0].bytes, 24u);
  EXPECT_EQ(source.tensors()[0].dtype, "F32");
  std::vector<float> out(6);
  source.read("second", out.data());
  EXPECT_EQ(out, (std::vector<float>{0, 1, 2, 3, 4, 5}));
  source.read("first", out.data());
  EXPECT_EQ(out[0], 1.0f);
  source.read("none", nullptr);
  ASSERT_TRUE(source.find("quantized"));
  EXPECT_EQ(source.find("quantized")->bytes, 74u);
  EXPECT_EQ(source.find("third"), nullptr);
  EXPECT_EQ(invalid_message([&] { source.read("third", out.data()); }, path), ": there is no tensor 'third'");
  EXPECT_EQ(invalid_message([&] { source.read("quantized", out.data()); }, path),
            ": tensor 'quantized': type: IQ2_XS is not one of F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, "
            "Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, BF16, MXFP4");
}

TEST_F(GgufTest, HostileHeadersAndMetadataAreRefused) {
  const auto head = [](uint64_t tensors, uint64_t values) {
    return "GGUF" + le(uint32_t{3}) + le(tensors) + le(values);
  };
  const auto meta = [&](const std::string& bytes) { return head(0, 1) + bytes; };
  const auto alignment = [](const std::string& alignment_value) { return Parts{{alignment_value}, {}, {}}.bytes(); };
  const std::string array = str("k") + le(kArray);
  struct Case {
    std::string bytes, message;
  };
  const Case cases[] = {
      {"", ": header: the file ends here, at byte 0"},
      {"GGU", ": header: the file ends here, at byte 3"},
      {"GGML" + std::string(20, '\0'), ": header: does not begin with 'GGUF'"},
      {"GGUF", ": header: the file ends here, at byte 4"},
      {"GGUF" + le(uint32_t{1}) + std::string(16, '\0'), ": header: version 1 is not 2 or 3"},
      {"GGUF" + le(uint32_t{4}) + std::string(16, '\0'), ": header: version 4 is not 2 or 3"},
      {"GGUF" + le(uint32_t{0x03000000}) + std::string(16, '\0'), ": header: big-endian files are not supported"},
      {head(UINT64_MAX, 0), ": header: 18446744073709551615 tensors is more than the remaining 8 bytes hold"},
      {head(0, UINT64_MAX), ": header: 18446744073709551615 metadata values is more than the remaining 0 bytes hold"},
      {head(0, 2) + std::string(25, 'x'), ": header: 2 metadata values is more than the remaining 25 bytes hold"},
      {meta(le(UINT64_MAX) + std::string(8, 'x')),
       ": metadata 0: a string of 18446744073709551615 is more than the remaining 8 bytes hold"},
      {meta(le(uint64_t{9}) + std::string(8, 'x')),
       ": metadata 0: a string of 9 is more than the remaining 8 bytes hold"},
      {meta(str("abcdef") + le(uint32_t{13})), ": metadata 'abcdef': type 13 is not known"},
      {meta(str("k\x01") + le(kBool) + "\x02"), ": metadata 'k\\x01': bool 2 is not 0 or 1"},
      {meta(value("k", kUint64, uint64_t{1} << 63)), ": metadata 'k': 9223372036854775808 exceeds 2^63 - 1"},
      {meta(str("k") + le(kFloat64) + "1234567"), ": metadata 'k': the file ends here, at byte 44"},
      {meta(str("k") + le(kString) + le(uint64_t{1})),
       ": metadata 'k': a string of 1 is more than the remaining 0 bytes hold"},
      {meta(array + le(uint32_t{99}) + le(uint64_t{0})), ": metadata 'k': type 99 is not known"},
      {meta(array + le(kArray) + le(uint64_t{0})), ": metadata 'k': arrays of arrays are not supported"},
      {meta(array + le(kUint8) + le(uint64_t{4}) + "abc"),
       ": metadata 'k': 4 array elements is more than the remaining 3 bytes hold"},
      {meta(array + le(kInt64) + le(uint64_t{1} << 61)),
       ": metadata 'k': 2305843009213693952 array elements is more than the remaining 0 bytes hold"},
      {meta(array + le(kString) + le(uint64_t{1} << 40) + std::string(64, '\0')),
       ": metadata 'k': 1099511627776 array elements is more than the remaining 64 bytes hold"},
      {head(0, 2) + value("k", kUint8, uint8_t{1}) + value("k", kUint8, uint8_t{1}), ": metadata 'k': occurs twice"},
      {alignment(value("general.alignment", kUint32, uint32_t{0})),
       ": metadata 'general.alignment': 0 is not a power of two below 2^31"},
      {alignment(value("general.alignment", kUint32, uint32_t{24})),
       ": metadata 'general.alignment': 24 is not a power of two below 2^31"},
      {alignment(value("general.alignment", kUint64, uint64_t{1} << 31)),
       ": metadata 'general.alignment': 2147483648 is not a power of two below 2^31"},
      {alignment(text_value("general.alignment", "32")),
       ": metadata 'general.alignment': the value is not a power of two below 2^31"},
  };
  for (const Case& c : cases) EXPECT_EQ(message_of(c.bytes), c.message);
  EXPECT_EQ(message_of(head(0, 0)), "");
}

TEST_F(GgufTest, HostileTensorsAreRefused) {
  const auto file = [](const std::vector<std::string>& tensors, size_t data_bytes) {
    return Parts{{}, tensors, std::string(data_bytes, '\0')}.bytes();
  };
  const std::string one = tensor("w", {1}, kF32, 0);
  struct Case {
    std::string bytes, message;
  };
  const Case cases[] = {
      {file({str("w") + le(uint32_t{5}) + std::string(60, '\0')}, 0), ": tensor 'w': 5 dimensions exceed 4"},
      {file({str("w") + le(UINT32_MAX) + std::string(60, '\0')}, 0), ": tensor 'w': 4294967295 dimensions exceed 4"},
      {file({tensor("w", {UINT64_MAX}, kF32, 0)}, 4), ": tensor 'w': 18446744073709551615 exceeds 2^63 - 1"},
      {file({tensor("w", {1ull << 32, 1ull << 32}, kF32, 0)}, 4),
       ": tensor 'w': product of the shape exceeds 2^63 - 1"},
      {file({tensor("w", {1ull << 62, 1ull << 1, 0}, kF32, 0)}, 4),
       ": tensor 'w': product of the shape exceeds 2^63 - 1"},
      {file({tensor("w", {0, 1ull << 32, 1ull << 32}, kF32, 0)}, 4),
       ": tensor 'w': product of the shape exceeds 2^63 - 1"},
      {file({tensor("w", {1ull << 62}, kF32, 0)}, 4), ": tensor 'w': number of bytes exceeds 2^64 - 1"},
      {file({tensor("w", {1}, 4, 0)}, 4), ": tensor 'w': type 4 is not known"},
      {file({tensor("w", {1}, 1000, 0)}, 4), ": tensor 'w': type 1000 is not known"},
      {file({tensor("w", {33}, kQ8_0, 0)}, 68),
       ": tensor 'w': innermost dimension 33 is not a multiple of the 32 elements in a block of Q8_0"},
      {file({tensor("w", {128, 2}, kQ4_K, 0)}, 144),
       ": tensor 'w': innermost dimension 128 is not a multiple of the 256 elements in a block of Q4_K"},
      {file({tensor("w", {}, kQ4_0, 0)}, 18),
       ": tensor 'w': innermost dimension 1 is not a multiple of the 32 elements in a block of Q4_0"},
      {file({tensor("w", {1}, kF32, 4)}, 36), ": tensor 'w': offset 4 is not a multiple of the alignment 32"},
      {file({tensor("w", {1}, kF32, 32)}, 35), ": tensor 'w': 4 bytes at offset 32 exceed the 35 bytes of data"},
      {file({tensor("w", {1}, kF32, UINT64_MAX - 31)}, 64),
       ": tensor 'w': 4 bytes at offset 18446744073709551584 exceed the 64 bytes of data"},
      {file({one}, 3), ": tensor 'w': 4 bytes at offset 0 exceed the 3 bytes of data"},
      {file({one, one}, 64), ": tensor 'w': occurs twice"},
      {file({one, tensor("v", {1}, kF32, 0)}, 64), ": tensor 'v': offset 0 lies in tensor 'w'"},
      {file({tensor("v", {8}, kF32, 32), tensor("w", {9}, kF32, 0)}, 64), ": tensor 'v': offset 32 lies in tensor 'w'"},
  };
  for (const Case& c : cases) EXPECT_EQ(message_of(c.bytes), c.message);
  EXPECT_EQ(message_of(file({one}, 4)), "");
  EXPECT_EQ(message_of(file({one, tensor("v", {1}, kF32, 64)}, 68)), "");  // padding between is the format's habit
}

TEST_F(GgufTest, EveryTruncationIsRefused) {
  Parts parts;
  parts.values = {text_value("general.architecture", "llama"), value("n", kUint32, uint32_t{1})};
  parts.tensors = {tensor("a", {2}, kF32, 0), tensor("b", {32}, kQ8_0, 32)};
  parts.data = std::string(32 + 34, '\0');
  const std::string whole = parts.bytes();
  EXPECT_EQ(message_of(whole), "");
  for (size_t size = 0; size < whole.size(); ++size) EXPECT_NE(message_of(whole.substr(0, size)), "") << size;
}

// A model in three files, of which the first has metadata alone.
class GgufPartsTest : public GgufTest {
 protected:
  struct Split {
    int64_t number, count = 3, num_tensors = 3;
  };

  static std::string name(int64_t number) { return "m-0000" + std::to_string(number + 1) + "-of-00003.gguf"; }

  static Parts part(const Split& split) {
    Parts parts;
    parts.values = {value("split.no", kUint16, static_cast<uint16_t>(split.number)),
                    value("split.count", kUint16, static_cast<uint16_t>(split.count)),
                    value("split.tensors.count", kInt32, static_cast<int32_t>(split.num_tensors))};
    if (split.number == 0) parts.values.push_back(text_value("general.architecture", "llama"));
    if (split.number == 1) parts.tensors = {tensor("b", {1}, kF32, 0), tensor("a", {2}, kF32, 32)};
    if (split.number == 2) parts.tensors = {tensor("c", {1}, kF32, 0)};
    if (split.number == 1) parts.data = le(1.0f) + std::string(28, '\0') + le(2.0f) + le(3.0f);
    if (split.number == 2) parts.data = le(4.0f);
    return parts;
  }

  std::string path(int64_t number) const { return (directory() / name(number)).string(); }
  void write_all() {
    for (int64_t i = 0; i < 3; ++i) write(name(i), part({i}).bytes());
  }
  // What opening part 2 says, which begins with the path of part `where`.
  std::string refusal(int64_t where) {
    return corrupt_message([&] { GgufSource{path(1)}; }, path(where) + ": ");
  }
};

TEST_F(GgufPartsTest, AnyPartStandsForAllOfThem) {
  write_all();
  for (int64_t given = 0; given < 3; ++given) {
    const GgufSource source(path(given));
    EXPECT_EQ(source.path(), path(0));
    EXPECT_EQ(*source.find_metadata("general.architecture"), GgufValue(std::string("llama")));
    ASSERT_EQ(source.tensors().size(), 3u);
    EXPECT_EQ(source.tensors()[1].name, "a");
    std::vector<float> a(2), c(1);
    source.read("a", a.data());
    source.read("c", c.data());
    EXPECT_EQ(a, (std::vector<float>{2, 3}));
    EXPECT_EQ(c[0], 4.0f);
  }
}

TEST_F(GgufPartsTest, PartsThatDoNotFitAreRefused) {
  write_all();
  std::filesystem::remove(path(2));
  EXPECT_EQ(refusal(2), "is missing; 3 files make up the model");
  write(name(2), part({.number = 1}).bytes());
  EXPECT_EQ(refusal(2), "metadata 'split.no': 1 is not 2, as its name says");
  write(name(2), part({.number = 2, .count = 4}).bytes());
  EXPECT_EQ(refusal(2), "metadata 'split.count': 4 is not 3, which the others say");
  Parts twice = part({2});
  twice.tensors = {tensor("a", {1}, kF32, 0)};
  write(name(2), twice.bytes());
  EXPECT_EQ(refusal(2), "tensor 'a': lies in " + path(1) + ", too");
  Parts not_a_number = part({2});
  not_a_number.values[0] = text_value("split.no", "2");
  write(name(2), not_a_number.bytes());
  EXPECT_EQ(refusal(2), "metadata 'split.no': is not a whole number");
  Parts unsaid = part({2});
  unsaid.values.pop_back();
  write(name(2), unsaid.bytes());
  EXPECT_EQ(refusal(2), "metadata 'split.tensors.count': missing is not 3, the number of tensors in all files");
  write_all();
  for (int64_t i = 0; i < 3; ++i) write(name(i), part({.number = i, .num_tensors = 4}).bytes());
  EXPECT_EQ(refusal(0), "metadata 'split.tensors.count': 4 is not 3, the number of tensors in all files");
}

TEST_F(GgufPartsTest, APartIsKnownByItsName) {
  write_all();
  const std::string by_name =
      ": metadata 'split.count': 3 is not 1, the number of files by its name "
      "(NAME-00001-of-00003.gguf)";
  for (const std::string other : {"m.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-0001-of-0003.gguf"}) {
    const std::string path = write(other, part({0}).bytes());
    EXPECT_EQ(corrupt_message([&] { GgufSource{path}; }, path), by_name);
  }
  const std::string alone = write("n-00002-of-00003.gguf", Parts{}.bytes());  // a name and no more
  EXPECT_EQ(GgufSource(alone).path(), alone);
}

// Dequantization held against a second implementation: element by element, straight from the
// description of the format, in the place of loops over blocks.

int bits(const uint8_t* bytes, int index, int first, int count) { return (bytes[index] >> first) & ((1 << count) - 1); }

// Normal half-precision numbers only.
float half(const uint8_t* bytes) {
  const int raw = bytes[0] | bytes[1] << 8;
  return std::ldexp(1.0f + static_cast<float>(raw & 1023) / 1024.0f, (raw >> 10 & 31) - 15) *
         (raw >> 15 ? -1.0f : 1.0f);
}

float reference(const std::string& type, const uint8_t* b, int i) {
  if (type == "Q8_0") return half(b) * static_cast<float>(static_cast<int8_t>(b[2 + i]));
  const auto nibble = [&](const uint8_t* nibbles) { return static_cast<float>(bits(nibbles, i % 16, i / 16 * 4, 4)); };
  if (type == "Q4_0") return half(b) * (nibble(b + 2) - 8);
  if (type == "Q4_1") return half(b) * nibble(b + 4) + half(b + 2);
  if (type == "Q4_K") {
    const uint8_t* s = b + 4;
    const int g = i / 32;
    const int scale = g < 4 ? bits(s, g, 0, 6) : bits(s, g + 4, 0, 4) + 16 * bits(s, g - 4, 6, 2);
    const int minimum = g < 4 ? bits(s, g + 4, 0, 6) : bits(s, g + 4, 4, 4) + 16 * bits(s, g, 6, 2);
    const int q = bits(b + 16, i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4);
    return half(b) * static_cast<float>(scale) * static_cast<float>(q) - half(b + 2) * static_cast<float>(minimum);
  }
  // Q6_K
  const int in_half = i % 128;
  const int low = bits(b, i / 128 * 64 + in_half % 64, in_half / 64 * 4, 4);
  const int high = bits(b + 128, i / 128 * 32 + in_half % 32, in_half / 32 * 2, 2);
  const auto scale = static_cast<float>(static_cast<int8_t>(b[192 + i / 16]));
  return half(b + 208) * scale * static_cast<float>(low + 16 * high - 32);
}

TEST_F(GgufTest, DequantizationEqualsTheReferenceBitByBit) {
  struct Case {
    uint32_t type;
    std::vector<int> halves;  // offsets of half-precision numbers in a block
  };
  const Case cases[] = {{8, {0}}, {2, {0}}, {3, {0, 2}}, {12, {0, 2}}, {14, {208}}};
  constexpr int kBlocks = 64;
  for (const auto& [type_id, halves] : cases) {
    const GgmlType& type = *find_ggml_type(type_id);
    std::string blocks;
    for (size_t i = 0; i < kBlocks * type.block_bytes; ++i) {
      blocks += static_cast<char>(philox(7, type_id, i)[0]);
    }
    for (int block = 0; block < kBlocks; ++block) {
      for (const int at : halves) {  // a normal number: exponent 1 to 30
        auto& high = reinterpret_cast<uint8_t&>(blocks[block * type.block_bytes + at + 1]);
        if ((high & 0x7c) == 0 || (high & 0x7c) == 0x7c) high ^= 0x20;
      }
    }
    Parts parts;
    parts.tensors = {tensor("w", {static_cast<uint64_t>(type.block_elements), kBlocks}, type_id, 0)};
    parts.data = blocks;
    const GgufSource source(write("a.gguf", parts.bytes()));
    std::vector<float> out(static_cast<size_t>(kBlocks * type.block_elements));
    source.read("w", out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      const size_t block = i / static_cast<size_t>(type.block_elements);
      const auto* bytes = reinterpret_cast<const uint8_t*>(blocks.data()) + block * type.block_bytes;
      const float expected =
          reference(type.name, bytes, static_cast<int>(i % static_cast<size_t>(type.block_elements)));
      ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(expected)) << type.name << " element " << i;
    }
  }
}

}  // namespace
}  // namespace coterie
