#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz_target.h"
#include "io/block_file.h"
#include "memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const coterie::MemoryFile file(data, size);
  coterie::NativeThreadPool pool(1);
  auto blocks = coterie::BlockFile::open(file.path(), "seed");
  if (!blocks || !blocks->verify(pool)) return 0;
  for (const char* name : {"a", "b"}) {
    const coterie::AlignedBuffer block = blocks->find(name);
    if (block.size() > 0) (void)*(block.as<char>() + block.size() - 1);
  }
  return 0;
}

std::vector<std::string> seeds() {
  const auto path = std::filesystem::temp_directory_path() / ("coterie_block_file_seed_" + std::to_string(getpid()));
  coterie::BlockFileWriter writer(path.string());
  writer.add("a", "abcde", 5);
  writer.add("b", nullptr, 0);
  writer.commit("seed");
  std::ifstream file(path, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(file)), {});
  std::filesystem::remove(path);
  return {bytes};
}
