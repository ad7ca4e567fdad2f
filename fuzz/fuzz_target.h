// What a fuzz target defines. libFuzzer calls the first with its inventions; replay.cc, the plain
// program of the test suite, with the seeds and what it makes of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Parses the bytes as a file and reads all that is in it. InvalidArgument and CorruptFile are right
// answers; any other exception, a sanitizer's report or a hang is a bug.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// Small whole files that reach every branch of the parser.
std::vector<std::string> seeds();
