#include "base/machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>

namespace coterie {
namespace {

// The number that a file begins with; `otherwise` without a file, for a word ("max") and for what is not positive.
double number_of(std::istream& file, double otherwise) {
  double value = 0;
  return file >> value && value > 0 ? value : otherwise;
}

double number_in(const std::string& path, double otherwise) {
  std::ifstream file(path);
  return number_of(file, otherwise);
}

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

// Processors of a quota: version 2 of control groups has "quota period" in one file, version 1 a file for each.
double cpu_quota(const std::string& group) {
  std::ifstream both(group + "/cpu.max");
  const double quota = number_of(both, kUnlimited);
  if (quota < kUnlimited) return quota / number_of(both, quota);
  return number_in(group + "/cpu/cpu.cfs_quota_us", kUnlimited) / number_in(group + "/cpu/cpu.cfs_period_us", 1);
}

// The number behind a name in a file of lines "name number"; 0 without.
double named_number(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.starts_with(name)) return std::strtod(line.c_str() + name.size(), nullptr);
  }
  return 0;
}

double memory_limit(const std::string& group) {
  return std::min(number_in(group + "/memory.max", kUnlimited),
                  number_in(group + "/memory/memory.limit_in_bytes", kUnlimited));
}

// Bytes in use that are not caches of files; one of the two versions is there.
double memory_in_use(const std::string& group) {
  return number_in(group + "/memory.current", 0) - named_number(group + "/memory.stat", "inactive_file ") +
         number_in(group + "/memory/memory.usage_in_bytes", 0) -
         named_number(group + "/memory/memory.stat", "total_inactive_file ");
}

}  // namespace

int available_cpus(const std::string& control_group) {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int allowed = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::max(1, static_cast<int>(std::min<double>(allowed, std::ceil(cpu_quota(control_group)))));
}

int64_t available_memory(const std::string& control_group) {
  const double all = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  return static_cast<int64_t>(std::min(all, memory_limit(control_group)));
}

int64_t unused_memory(const std::string& control_group) {
  const double of_machine = 1024 * named_number("/proc/meminfo", "MemAvailable:");
  const double of_group = memory_limit(control_group) - memory_in_use(control_group);
  return static_cast<int64_t>(std::max(0.0, std::min(of_machine, of_group)));
}

}  // namespace coterie
