#include "io/packed_tokens.h"

#include <gtest/gtest.h>

#include <vector>

#include "io/test_files.h"

namespace coterie {
namespace {

class PackedTokensTest : public TemporaryDirectoryTest {
 protected:
  template <typename Token>
  void write_tokens(const std::string& name, const std::vector<Token>& tokens) {
    write(name, std::string(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(Token)));
  }

  void write_meta(const std::string& dtype, int64_t vocab_size, const std::string& train, const std::string& valid) {
    write("meta.json", R"({"format": 1, "vocab_size": )" + std::to_string(vocab_size) + R"(, "dtype": ")" + dtype +
                           R"(", "eos_token_id": 0, "train": )" + train + R"(, "valid": )" + valid +
                           R"(, "sources": [{"name": "x"}]})");
  }

  std::vector<int32_t> copy(const PackedTokens& tokens, int64_t first, int64_t count) {
    std::vector<int32_t> out(static_cast<size_t>(count));
    tokens.copy(first, count, out.data());
    return out;
  }
};

constexpr char kFour[] = R"({"tokens": 4, "bytes": 11, "documents": 2})";
constexpr char kOne[] = R"({"tokens": 1, "bytes": 7, "documents": 1})";

TEST_F(PackedTokensTest, ReadsBothSplitsAndWidths) {
  write_tokens<uint16_t>("train.bin", {5, 65535, 0, 9});
  write_tokens<uint16_t>("valid.bin", {3});
  write_meta("uint16", 65536, kFour, kOne);
  const PackedTokens train(directory().string(), "train"), valid(directory().string(), "valid");
  EXPECT_EQ(train.num_tokens(), 4);
  EXPECT_EQ(train.num_bytes(), 11);
  EXPECT_EQ(train.vocab_size(), 65536);
  EXPECT_EQ(train.eos_token_id(), 0);
  EXPECT_EQ(train[1], 65535);
  EXPECT_EQ(copy(train, 1, 3), (std::vector<int32_t>{65535, 0, 9}));
  EXPECT_EQ(copy(train, 4, 0), std::vector<int32_t>{});
  EXPECT_EQ(copy(valid, 0, 1), std::vector<int32_t>{3});
  EXPECT_EQ(valid.num_bytes(), 7);
  EXPECT_THROW(copy(train, 2, 3), std::logic_error);
  EXPECT_THROW(copy(train, -1, 1), std::logic_error);

  write_tokens<uint32_t>("train.bin", {5, 99999, 0, 9});
  write_meta("uint32", 100000, kFour, kOne);
  EXPECT_EQ(copy(PackedTokens(directory().string(), "train"), 0, 4), (std::vector<int32_t>{5, 99999, 0, 9}));
}

TEST_F(PackedTokensTest, AnIdOutsideTheVocabularyIsRefusedWhenCopied) {
  const std::string bin = (directory() / "train.bin").string();
  write_tokens<uint16_t>("train.bin", {5, 7, 0, 6});
  write_meta("uint16", 7, kFour, kOne);
  const PackedTokens train(directory().string(), "train");
  EXPECT_EQ(copy(train, 2, 2), (std::vector<int32_t>{0, 6}));
  EXPECT_EQ(corrupt_message([&] { copy(train, 1, 2); }, bin), ": token 1: id 7 is not below vocab_size 7");
  write_tokens<uint32_t>("train.bin", {5, 0xffffffffu, 0, 6});
  write_meta("uint32", 7, kFour, kOne);
  const PackedTokens wide(directory().string(), "train");
  EXPECT_EQ(corrupt_message([&] { copy(wide, 0, 4); }, bin), ": token 1: id 4294967295 is not below vocab_size 7");
}

TEST_F(PackedTokensTest, ContradictionsAreNamed) {
  const std::string where = directory().string(), meta = where + "/meta.json", bin = where + "/train.bin";
  const auto open = [&] { PackedTokens{where, "train"}; };
  EXPECT_EQ(invalid_message(open, bin), ": No such file or directory");
  write_tokens<uint16_t>("train.bin", {1, 2, 3, 4});
  EXPECT_EQ(invalid_message(open, meta), ": No such file or directory");
  EXPECT_EQ(invalid_message([&] { PackedTokens{where, "test"}; }, ""), "split: 'test' is not 'train' or 'valid'");
  struct Case {
    std::string meta, message;
  };
  const Case cases[] = {
      {"", ": invalid JSON at byte 0"},
      {"[]", ": format: is missing"},
      {R"({"format": 2})", ": format: '2' is not a whole number of 1 to 1"},
      {R"({"format": 1})", ": dtype: is missing"},
      {R"({"format": 1, "dtype": 16})", ": dtype: is not a string"},
      {R"({"format": 1, "dtype": "int8"})", ": dtype: 'int8' is not 'uint16' or 'uint32'"},
      {R"({"format": 1, "dtype": "uint16", "vocab_size": 0})",
       ": vocab_size: '0' is not a whole number of 1 to 2147483647"},
      {R"({"format": 1, "dtype": "uint16", "vocab_size": 9, "eos_token_id": 9})",
       ": eos_token_id: '9' is not a whole number of 0 to 8"},
      {R"({"format": 1, "dtype": "uint16", "vocab_size": 9, "eos_token_id": 0})", ": train: is missing"},
      {R"({"format": 1, "dtype": "uint16", "vocab_size": 9, "eos_token_id": 0, "train": {"tokens": -4}})",
       ": train.tokens: '-4' is not a whole number of 0 to 2305843009213693951"},
      {R"({"format": 1, "dtype": "uint16", "vocab_size": 9, "eos_token_id": 0, "train": {"tokens": 4}})",
       ": train.bytes: is missing"},
  };
  for (const Case& c : cases) {
    write("meta.json", c.meta);
    EXPECT_EQ(corrupt_message(open, meta), c.message);
  }
  write_meta("uint32", 9, kFour, kOne);
  EXPECT_EQ(corrupt_message(open, bin), ": 8 bytes, but train.tokens of meta.json (4, uint32) needs 16");
  write_meta("uint16", 9, kOne, kOne);
  EXPECT_EQ(corrupt_message(open, bin), ": 8 bytes, but train.tokens of meta.json (1, uint16) needs 2");
  write_meta("uint16", 9, kFour, kOne);
  EXPECT_EQ(corrupt_message(open, bin), "");
}

}  // namespace
}  // namespace coterie
