// Choosing the next token from logits. Order and meaning as in Hugging Face transformers and vLLM:
// temperature, then top-k (tokens as likely as the k-th stay), then top-p (the likeliest tokens until
// their sum reaches top_p, the one that reaches it included). Legend: V vocabulary.
#pragma once

#include <cstdint>
#include <span>

#include "coterie/engine.h"

namespace coterie {

// position is that of the token to choose. Random choices are keyed by (seed, position) alone, so that
// a sequence has the same continuation alone and in a batch. Greedy ties go to the lower id.
int32_t sample(std::span<const float> logits_V, const SamplingParams& params, int64_t position);

}  // namespace coterie
