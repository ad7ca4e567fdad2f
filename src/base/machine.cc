#include "base/machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
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

}  // namespace

int available_cpus(const std::string& control_group) {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int allowed = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::max(1, static_cast<int>(std::min<double>(allowed, std::ceil(cpu_quota(control_group)))));
}

int64_t available_memory(const std::string& control_group) {
  const double all = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  const double limit = std::min(number_in(control_group + "/memory.max", kUnlimited),
                                number_in(control_group + "/memory/memory.limit_in_bytes", kUnlimited));
  return static_cast<int64_t>(std::min(all, limit));
}

}  // namespace coterie
