#include "kernels/kernel_table.h"

#include <atomic>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "base/log.h"
#include "coterie/error.h"

namespace coterie {
namespace {

// Best first. A new ISA needs a row here and its table's declaration.
struct Implementation {
  const KernelTable* table;
  bool (*runs_here)();
};

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's dot product of bf16 does half as many products a second as FMA does (measured on Emerald Rapids: 172 and 350
// GFLOP/s).
bool has_fast_avx512_bf16() { return has_avx512_bf16() && !__builtin_cpu_is("intel"); }
bool has_slow_avx512_bf16() { return has_avx512_bf16() && !has_fast_avx512_bf16(); }
bool has_amx() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") &&
         may_use_tiles();
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool always() { return true; }

const Implementation kImplementations[] = {
    {&kAmxKernels, has_amx},       {&kAvx512Bf16Kernels, has_fast_avx512_bf16},
    {&kAvx512Kernels, has_avx512}, {&kAvx512Bf16Kernels, has_slow_avx512_bf16},
    {&kAvx2Kernels, has_avx2},     {&kGenericKernels, always},
};

std::string known_names() {
  std::set<std::string> names;  // a table may have several rows
  for (const Implementation& implementation : kImplementations) names.emplace(implementation.table->name);
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

const KernelTable* forced_kernels(std::string_view name) {
  for (const KernelTable* table : supported_kernels()) {
    if (table->name == name) return table;
  }
  for (const Implementation& implementation : kImplementations) {
    if (implementation.table->name == name) {
      throw InvalidArgument("COTERIE_ISA: this CPU does not run '" + std::string(name) + "'");
    }
  }
  throw InvalidArgument("COTERIE_ISA: '" + std::string(name) + "' is not one of " + known_names());
}

const KernelTable* choose_kernels() {
  const char* forced = std::getenv("COTERIE_ISA");
  const KernelTable* table = forced && *forced ? forced_kernels(forced) : supported_kernels().front();
  log_info("kernels: " + std::string(table->name));
  return table;
}

std::atomic<const KernelTable*> overridden{nullptr};

}  // namespace

std::span<const KernelTable* const> supported_kernels() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found;
    for (const Implementation& implementation : kImplementations) {
      if (implementation.runs_here()) found.push_back(implementation.table);
    }
    return found;
  }();
  return tables;
}

const KernelTable& active_kernels() {
  if (const KernelTable* table = overridden.load(std::memory_order_acquire)) return *table;
  static const KernelTable* const chosen = choose_kernels();
  return *chosen;
}

ScopedKernels::ScopedKernels(const KernelTable& table) : previous_(overridden.exchange(&table)) {}
ScopedKernels::~ScopedKernels() { overridden.store(previous_); }

}  // namespace coterie
