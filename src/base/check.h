// COTERIE_CHECK(condition, message): for our own bugs only, never for user input (that is
// error.h). Throws std::logic_error so that a Python process survives to print the trace.
#pragma once

#include <stdexcept>
#include <string>

#define COTERIE_CHECK(condition, message)                                                                              \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      throw std::logic_error(std::string(__FILE__ ":") + std::to_string(__LINE__) + ": " #condition ": " + (message)); \
    }                                                                                                                  \
  } while (false)
