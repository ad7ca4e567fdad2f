// Serving from C++ with include/coterie/engine.h alone: several requests at once, tokens as they come.
//
//   generate MODEL 1,2,3 [4,5,6 ...]     each argument behind the model is a prompt, as token ids
//
// prints a line "prompt: tokens (reason)" for each. Link with the library coterie_engine.
#include <charconv>
#include <cstdint>
#include <exception>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "coterie/engine.h"
#include "coterie/error.h"

namespace {

std::vector<int32_t> parse_token_ids(const std::string& text) {
  std::vector<int32_t> ids;
  const char *at = text.data(), *end = at + text.size();
  while (at < end) {
    int32_t id = 0;
    const auto [next, error] = std::from_chars(at, end, id);
    const bool separated = next == end || (*next == ',' && next + 1 < end);
    if (error != std::errc() || !separated) throw coterie::InvalidArgument("prompt: '" + text + "' is not like 1,2,3");
    ids.push_back(id);
    at = next == end ? end : next + 1;
  }
  return ids;
}

const char* name(coterie::FinishReason reason) {
  return reason == coterie::FinishReason::kStop     ? "stop"
         : reason == coterie::FinishReason::kLength ? "length"
                                                    : "aborted";
}

void run(const std::string& model, const std::vector<std::string>& prompts) {
  const auto engine = coterie::Engine::load(model, {.dtype = "fp32", .max_num_seqs = 8});
  std::map<coterie::RequestId, std::string> texts;
  for (const std::string& prompt : prompts) {
    coterie::Request request;
    request.prompt_token_ids = parse_token_ids(prompt);
    request.sampling.max_new_tokens = 8;
    texts[engine->add_request(request)] = prompt + ":";
  }
  while (engine->has_unfinished()) {
    for (const coterie::StepOutput& output : engine->step()) {
      std::string& text = texts[output.request_id];
      for (const int32_t token : output.new_token_ids) text.append(" ").append(std::to_string(token));
      if (output.finish_reason) std::cout << text << " (" << name(*output.finish_reason) << ")" << std::endl;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: generate MODEL 1,2,3 [4,5,6 ...]\n";
    return 2;
  }
  try {
    run(argv[1], std::vector<std::string>(argv + 2, argv + argc));
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
