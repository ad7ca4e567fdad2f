#include "comm/agreement.h"

#include <cstdio>
#include <string>
#include <vector>

#include "coterie/error.h"

namespace coterie {
namespace {

// FNV-1a, 64 bits: against mistakes, not against an adversary.
uint64_t hash_of(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

std::string hex(uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace

void require_same(ProcessGroup& group, std::string_view text, std::string_view what) {
  const uint64_t own = hash_of(text);
  std::vector<uint64_t> hashes(static_cast<size_t>(group.size()));
  group.all_gather(&own, hashes.data(), sizeof own, "compare " + std::string(what));
  for (size_t r = 1; r < hashes.size(); ++r) {
    if (hashes[r] == hashes[0]) continue;
    throw InvalidArgument("rank " + std::to_string(group.world_rank(static_cast<int>(r))) + " runs another " +
                          std::string(what) + " than rank " + std::to_string(group.world_rank(0)) + " (hash " +
                          hex(hashes[r]) + ", not " + hex(hashes[0]) + ")");
  }
}

}  // namespace coterie
