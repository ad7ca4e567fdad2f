#include "model/gguf_end_tokens.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <unordered_set>

namespace coterie {
namespace {

// Texts that end an answer in the vocabularies of the architectures that we read, whatever their type is by
// tokenizer.ggml.token_type. llama.cpp, too, goes by the text, and takes another type than control for a fault of the
// file.
constexpr std::string_view kEnds[] = {
    "<|eot_id|>",       // Llama 3
    "<|eom_id|>",       // likewise, to a tool
    "<|end_of_text|>",  // Llama 3, Granite
    "<|im_end|>",       // Qwen and many others
    "<|end|>",          // Phi
    "<|return|>",       // gpt-oss
    "<|call|>",         // likewise, to a tool
    "<|calls|>",        // Solar, to a tool
    "<end_of_turn>",    // Gemma
    "<|endoftext|>",    // GPT-2, Qwen, OLMoE
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",                                    // the latter two of Kimi
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  // DeepSeek
};

// gpt-oss has this one between the parts of an answer, and others at its end.
constexpr std::string_view kEndOfPart = "<|end|>", kEndOfAll = "<|return|>";

std::vector<int64_t> tokens_known_to_end(const GgufMetadata& metadata) {
  const std::vector<std::string> texts = metadata.texts("/tokenizer.ggml.tokens");
  const bool has_parts = std::ranges::find(texts, kEndOfAll) != texts.end();
  std::vector<int64_t> ids;
  for (size_t id = 0; id < texts.size(); ++id) {
    if (has_parts && texts[id] == kEndOfPart) continue;
    if (std::ranges::find(kEnds, texts[id]) != std::end(kEnds)) ids.push_back(static_cast<int64_t>(id));
  }
  return ids;
}

}  // namespace

std::vector<int64_t> end_tokens_of_gguf(const GgufMetadata& metadata) {
  std::vector<int64_t> found;
  for (const char* key : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
    if (const auto id = metadata.token_id(std::string("/tokenizer.ggml.") + key)) found.push_back(*id);
  }
  for (const auto& ids : {metadata.token_ids("/tokenizer.ggml.eos_token_ids"), tokens_known_to_end(metadata)}) {
    found.insert(found.end(), ids.begin(), ids.end());
  }
  std::unordered_set<int64_t> seen;
  std::erase_if(found, [&](int64_t id) { return !seen.insert(id).second; });
  return found;
}

}  // namespace coterie
