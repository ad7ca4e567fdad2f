#include "train/expert_parallel_json.h"

#include <nlohmann/json.hpp>

#include "coterie/error.h"
#include "train/expert_layout.h"

namespace coterie {

std::vector<int64_t> expert_parallel_from_json(const std::string& text) {
  using Json = nlohmann::json;
  const Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const bool is_list = value.is_array() && !value.empty();
  std::vector<int64_t> degrees;
  for (const Json& entry : is_list ? value : Json::array({value})) {
    if (entry == "auto") {
      degrees.push_back(ExpertParallelSettings::kAuto);
    } else if (entry.is_number_integer() && entry.get<int64_t>() > 0) {
      degrees.push_back(entry.get<int64_t>());
    } else {
      throw InvalidArgument("parallel.expert_parallel: must be \"auto\", a positive number or a list of these (" +
                            text + ")");
    }
  }
  return degrees;
}

}  // namespace coterie
