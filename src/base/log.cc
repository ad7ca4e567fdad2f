#include "base/log.h"

#include <cstdio>
#include <cstdlib>

namespace coterie {

void log_info(std::string_view message) {
  static const bool enabled = [] {
    const char* value = std::getenv("COTERIE_LOG");
    return value && *value && *value != '0';
  }();
  if (enabled) std::fprintf(stderr, "[coterie] %.*s\n", static_cast<int>(message.size()), message.data());
}

}  // namespace coterie
