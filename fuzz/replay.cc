// A fuzz target without libFuzzer, for every compiler and the test suite:
//   X_replay              its seeds, all their beginnings, and each of their bytes changed in turn
//   X_replay FILE...      these files (what libFuzzer found)
//   X_replay --write DIR  writes the seeds there, for libFuzzer to start from
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

#include "fuzz_target.h"

namespace {

void run(const std::string& bytes) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

// Returns the number of inputs.
size_t run_variations(const std::string& seed) {
  size_t count = 0;
  for (size_t size = 0; size <= seed.size(); ++size, ++count) run(seed.substr(0, size));
  for (size_t i = 0; i < seed.size(); ++i) {
    for (const int flip : {0x01, 0x02, 0x10, 0x20, 0x7f, 0x80, 0xff}) {
      std::string changed = seed;
      changed[i] = static_cast<char>(changed[i] ^ flip);
      run(changed);
      ++count;
    }
  }
  return count;
}

void write_seeds(const std::filesystem::path& directory) {
  std::filesystem::create_directories(directory);
  size_t number = 0;
  for (const std::string& seed : seeds()) {
    std::ofstream(directory / ("seed_" + std::to_string(number++)), std::ios::binary) << seed;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string_view(argv[1]) == "--write") {
    write_seeds(argv[2]);
    return 0;
  }
  size_t count = 0;
  if (argc == 1) {
    for (const std::string& seed : seeds()) count += run_variations(seed);
  }
  for (int i = 1; i < argc; ++i, ++count) {
    std::ifstream file(argv[i], std::ios::binary);
    run({std::istreambuf_iterator<char>(file), {}});
  }
  std::printf("%zu inputs\n", count);
  return 0;
}
