// For tests of parsers: a directory that is removed afterwards, and the message of an exception.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "coterie/error.h"

namespace coterie {

class TemporaryDirectoryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "coterie_test_XXXXXX").string();
    ASSERT_TRUE(mkdtemp(pattern.data()));
    directory_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  const std::filesystem::path& directory() const { return directory_; }

  // Returns the path.
  std::string write(const std::string& name, const std::string& bytes) const {
    const std::string path = (directory_ / name).string();
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

 private:
  std::filesystem::path directory_;
};

// What the Exception that `action` throws says after `prefix` (the file's path), the whole message
// when it begins otherwise, and nothing when nothing is thrown. Other exceptions pass.
template <typename Exception, typename Action>
std::string message(Action&& action, const std::string& prefix) {
  try {
    action();
  } catch (const Exception& error) {
    const std::string what = error.what();
    return what.starts_with(prefix) ? what.substr(prefix.size()) : what;
  }
  return "";
}

template <typename Action>
std::string corrupt_message(Action&& action, const std::string& prefix) {
  return message<CorruptFile>(action, prefix);
}

template <typename Action>
std::string invalid_message(Action&& action, const std::string& prefix) {
  return message<InvalidArgument>(action, prefix);
}

}  // namespace coterie
