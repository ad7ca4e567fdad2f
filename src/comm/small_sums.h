// Sums of a few numbers that ranks have counted or measured: one message each way, whatever their number.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "comm/process_group.h"

namespace coterie {

// Collective. Each number becomes the sum of every rank's, added in rank order. Null: this rank alone, nothing happens.
void sum_over_ranks(ProcessGroup* group, std::span<double> numbers, std::string_view label);

// The same of whole numbers that lie in several places.
void sum_over_ranks(ProcessGroup* group, const std::vector<std::span<int64_t>>& counts, std::string_view label);

}  // namespace coterie
