// A router alone as JSON, with the keys of "router" in a config.json (model/config.h) and its sizes beside them:
// {"num_experts": 8, "top_k": 2, "normalize": true, ...}.
#pragma once

#include <string>

#include "moe/router.h"

namespace coterie {

// InvalidArgument names the key: what is left out has its default, an unknown key is refused. Validated.
RouterConfig router_from_json(const std::string& text);
std::string router_to_json(const RouterConfig& config);

}  // namespace coterie
