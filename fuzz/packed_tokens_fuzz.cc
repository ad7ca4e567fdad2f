// A directory of packed tokens: the bytes are meta.json, up to the first zero byte, and train.bin behind it.
#include "io/packed_tokens.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "coterie/error.h"
#include "fuzz_target.h"

namespace {

// One for the whole process: its two files are written anew for every input.
class Directory {
 public:
  Directory()
      : path_(std::filesystem::temp_directory_path() / ("coterie_packed_tokens_fuzz_" + std::to_string(getpid()))) {
    std::filesystem::create_directory(path_);
  }
  ~Directory() { std::filesystem::remove_all(path_); }

  std::string path() const { return path_.string(); }
  void write(const char* name, std::string_view bytes) const {
    std::ofstream(path_ / name, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }

 private:
  std::filesystem::path path_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Directory directory;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(bytes.find('\0'), size);
  directory.write("meta.json", bytes.substr(0, end));
  directory.write("train.bin", bytes.substr(std::min(end + 1, size)));
  try {
    const coterie::PackedTokens tokens(directory.path(), "train");
    std::vector<int32_t> ids(static_cast<size_t>(tokens.num_tokens()));
    tokens.copy(0, tokens.num_tokens(), ids.data());
  } catch (const coterie::InvalidArgument&) {
  } catch (const coterie::CorruptFile&) {
  }
  return 0;
}

std::vector<std::string> seeds() {
  const auto seed = [](const char* dtype, const std::string& ids) {
    return R"({"format": 1, "dtype": ")" + std::string(dtype) + R"(", "vocab_size": 9, "eos_token_id": 0,)" +
           R"( "train": {"tokens": 2, "bytes": 3}})" + '\0' + ids;
  };
  return {seed("uint16", {"\5\0\0\0", 4}), seed("uint32", {"\5\0\0\0\0\0\0\0", 8})};
}
