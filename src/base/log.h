// One line of news to whoever runs the program: `[coterie] kernels: avx512`. Off unless COTERIE_LOG
// is set to 1 or more (stderr), since a library that prints is a nuisance. Any thread.
#pragma once

#include <string_view>

namespace coterie {

void log_info(std::string_view message);

}  // namespace coterie
