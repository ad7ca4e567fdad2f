// The engine: token ids in, token ids out. One process, one model, std types only.
//
//   auto engine = coterie::Engine::load("path/to/model", {.dtype = "bf16"});
//   coterie::Request request{.prompt_token_ids = ids, .sampling = {.max_new_tokens = 64}};
//   coterie::RequestOutput output = engine->generate(request);
//
// One thread at a time may call an Engine; different Engines are independent.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace coterie {

struct EngineOptions {
  std::string dtype = "fp32";  // of weights and KV cache: "fp32" or "bf16"
  int threads = 0;             // 0: as many as the process may use
  int64_t max_model_len = 0;   // tokens of prompt and output together; 0: the model's own limit
};

// How the next token is chosen. The defaults are greedy.
struct SamplingParams {
  int64_t max_new_tokens = 128;
  float temperature = 0.0f;             // 0: greedy
  int64_t top_k = 0;                    // keep the k likeliest; 0: all
  float top_p = 1.0f;                   // keep the likeliest that together reach top_p; 1: all
  uint64_t seed = 0;                    // equal seeds give equal tokens
  std::vector<int64_t> stop_token_ids;  // beside the model's own end tokens
  bool ignore_eos = false;

  void validate() const;  // InvalidArgument: "top_p: 1.5 is not in (0, 1]"
};

struct Request {
  std::vector<int32_t> prompt_token_ids;
  SamplingParams sampling;
};

enum class FinishReason { kStop, kLength, kAborted };

struct RequestOutput {
  std::vector<int32_t> token_ids;  // generated ones, an end token included
  FinishReason finish_reason = FinishReason::kLength;
  double prefill_seconds = 0;
  double decode_seconds = 0;
};

class Engine {
 public:
  // path: a Hugging Face directory (config.json and safetensors) or a .gguf file. InvalidArgument or
  // CorruptFile say what is wrong with it.
  static std::unique_ptr<Engine> load(const std::string& path, const EngineOptions& options = {});
  virtual ~Engine() = default;

  // Runs one request to its end. on_token (may be empty) sees every new token; returning false stops
  // the generation with kAborted (that is how stop strings work: the text lives in the caller).
  virtual RequestOutput generate(const Request& request, const std::function<bool(int32_t)>& on_token = {}) = 0;

  // logits[T * vocab_size], row t after token t, of one sequence from its start.
  virtual std::vector<float> logits(const std::vector<int32_t>& token_ids) = 0;

  // The experts chosen for every token of one sequence: [num_moe_layers][T * top_k].
  virtual std::vector<std::vector<int32_t>> expert_ids(const std::vector<int32_t>& token_ids) = 0;

  // Sum of -log p(token t+1 | tokens up to t) over the sequence, in nats; T - 1 terms, T at most
  // max_model_len() + 1 (the last token is only predicted).
  virtual double negative_log_likelihood(const std::vector<int32_t>& token_ids) = 0;

  virtual int64_t vocab_size() const = 0;
  virtual int64_t max_model_len() const = 0;
  virtual std::string config_json() const = 0;  // as CoterieForCausalLM, see src/model/config.h
};

}  // namespace coterie
