// The setting parallel.expert_parallel as the command hands it over.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace coterie {

// "auto", a degree, or a list of these, one entry for each MoE layer: ExpertParallelSettings::expert_parallel.
// InvalidArgument: "parallel.expert_parallel: must be \"auto\", a positive number or a list of these (0)".
std::vector<int64_t> expert_parallel_from_json(const std::string& text);

}  // namespace coterie
