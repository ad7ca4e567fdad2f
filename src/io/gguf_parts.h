// The files of a split GGUF model by their names: NAME-00001-of-00003.gguf and so on.
#pragma once

#include <string>
#include <vector>

namespace coterie {

// All files of a model in order, where `path` is named like one of several, whether or not they exist; else the path
// alone. What a file itself says, GgufSource holds against this.
std::vector<std::string> gguf_parts(const std::string& path);

}  // namespace coterie
