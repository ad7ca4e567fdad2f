#include "engine/sequence.h"

#include <algorithm>

namespace coterie {

Sequence::Sequence(const Request& request, std::span<const int64_t> end_token_ids, int64_t max_model_len,
                   KvCache& cache)
    : sampling_(request.sampling),
      end_token_ids_(request.sampling.stop_token_ids),
      max_model_len_(max_model_len),
      token_ids_(request.prompt_token_ids),
      num_prompt_tokens_(num_tokens()),
      blocks_(cache) {
  if (!sampling_.ignore_eos) end_token_ids_.insert(end_token_ids_.end(), end_token_ids.begin(), end_token_ids.end());
}

std::span<const int32_t> Sequence::pending(int64_t most) const {
  return std::span(token_ids_).subspan(num_computed_, std::min(most, num_tokens() - num_computed_));
}

void Sequence::append(int32_t token_id) {
  token_ids_.push_back(token_id);
  const int64_t num_new = num_tokens() - num_prompt_tokens_;
  if (std::ranges::find(end_token_ids_, token_id) != end_token_ids_.end()) {
    finished_ = FinishReason::kStop;
  } else if (num_new >= sampling_.max_new_tokens || num_tokens() >= max_model_len_) {
    finished_ = FinishReason::kLength;
  }
}

std::vector<int32_t> Sequence::output() const { return {token_ids_.begin() + num_prompt_tokens_, token_ids_.end()}; }

}  // namespace coterie
