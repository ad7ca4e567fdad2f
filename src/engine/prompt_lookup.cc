#include "engine/prompt_lookup.h"

#include <algorithm>

namespace coterie {

std::span<const int32_t> look_up(std::span<const int32_t> token_ids, int64_t shortest, int64_t longest,
                                 int64_t num_tokens) {
  const auto T = static_cast<int64_t>(token_ids.size());
  int64_t best_run = shortest - 1, best_end = T;
  for (int64_t end = T - 1; end >= shortest && best_run < longest; --end) {
    int64_t run = 0;  // of the tokens before end that are also before T
    while (run < std::min(longest, end) && token_ids[end - 1 - run] == token_ids[T - 1 - run]) ++run;
    if (run > best_run) best_run = run, best_end = end;
  }
  return token_ids.subspan(best_end, std::min(num_tokens, T - best_end));
}

}  // namespace coterie
