// Guesses what follows from what the text itself says: answers often repeat parts of their prompt.
#pragma once

#include <cstdint>
#include <span>

namespace coterie {

// What followed, at most num_tokens of it, where the last tokens occurred before: the longest run of them, up to
// longest; of equally long ones the latest. Empty where not even the last `shortest` tokens occurred.
std::span<const int32_t> look_up(std::span<const int32_t> token_ids, int64_t shortest, int64_t longest,
                                 int64_t num_tokens);

}  // namespace coterie
