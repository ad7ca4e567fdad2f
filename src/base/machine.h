// What of the machine this process may use: less than all of it within a container (a control group of Linux).
#pragma once

#include <cstdint>
#include <string>

namespace coterie {

inline constexpr const char* kControlGroup = "/sys/fs/cgroup";

// Processors that it may run on, at least 1; a quota of 1.5 is 2.
int available_cpus(const std::string& control_group = kControlGroup);

// Bytes of memory, used or not.
int64_t available_memory(const std::string& control_group = kControlGroup);

// Of those, the ones that nothing but caches of files uses now.
int64_t unused_memory(const std::string& control_group = kControlGroup);

}  // namespace coterie
