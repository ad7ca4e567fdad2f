// Which tokens end a text, as a GGUF file says it.
#pragma once

#include <cstdint>
#include <vector>

#include "model/gguf_metadata.h"

namespace coterie {

// Ids by tokenizer.ggml.eos_token_id, eot_token_id (a turn's end), eom_token_id (a message's, where a tool is asked)
// and the list eos_token_ids; then those of tokens whose text is known to end a turn (gguf_end_tokens.cc lists them),
// since many files name one id only. Each once.
std::vector<int64_t> end_tokens_of_gguf(const GgufMetadata& metadata);

}  // namespace coterie
