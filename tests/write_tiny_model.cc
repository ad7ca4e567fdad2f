// Writes a tiny model with random weights into the directory that it is given, for tests of programs.
#include <iostream>

#include "model/test_model.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: write_tiny_model DIRECTORY\n";
    return 2;
  }
  coterie::write_random_model(argv[1], coterie::small_config());
  return 0;
}
