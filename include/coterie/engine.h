// The engine: token ids in, token ids out. One process, one model, std types only.
//
//   auto engine = coterie::Engine::load("path/to/model", {.dtype = "bf16"});
//   coterie::RequestOutput output = engine->generate({.prompt_token_ids = ids, .sampling = {.max_new_tokens = 64}});
//
// or many requests at once, each of which gives the same tokens as it would alone:
//
//   coterie::RequestId id = engine->add_request({.prompt_token_ids = ids});
//   while (engine->has_unfinished())
//     for (const coterie::StepOutput& output : engine->step()) ...
//
// One thread at a time may call an Engine; different Engines are independent.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace coterie {

struct EngineOptions {
  std::string dtype = "auto";             // of the weights: "fp32", "bf16", "int8", "int8a16", "int4" or "int4_64";
                                          // "auto": as the file was quantized, else fp32 where most of it is, else bf16
  std::string attention_dtype = "";       // of attention's projections where it differs from dtype
  std::string head_dtype = "";            // of the head and the embedding likewise
  bool weight_cache = true;               // keep packed weights in a file beside the model (not for small models)
  std::string weight_cache_dir = "";      // that file's directory, made when absent; empty: beside the model
  bool mmap = false;                      // leave the weights in that file, mapped: less memory, runs slower; those
                                          // of more than three quarters of memory stay there anyway
  int64_t expert_cache_bytes = 0;         // of mapped weights, memory for the experts that are chosen most; 0: a
                                          // quarter of what the process may use, -1: none
  int threads = 0;                        // 0: as many as the process may use
  int64_t max_model_len = 0;              // tokens of prompt and output together; 0: the model's own limit
  int64_t max_num_seqs = 256;             // completions that run at once; others wait
  int64_t max_num_batched_tokens = 2048;  // tokens of a step: first one for each decoding completion, then prompts
  std::string kv_cache_dtype = "auto";    // "fp32", "bf16", "int8"; "auto": int8 where attention's weights are in few
                                          // bits and not latent, else bf16, beside fp32 fp32
  int64_t block_size = 64;                // tokens of a block of the cache, which requests share as a whole: a multiple
                                          // of 16, at most 1024. Attention reads 64 at a time
  int64_t num_kv_blocks = 0;              // blocks of the cache; 0: by kv_cache_bytes
  int64_t kv_cache_bytes = 0;             // taken as it is needed, for 4096 tokens (at most 256 MiB) at once; 0: a
                                          // quarter of the memory that the process may use, at most what max_num_seqs
                                          // need, at least what one of max_model_len needs
  bool enable_prefix_caching = true;      // compute what requests begin with in common only once
  std::string load_format = "auto";       // "dummy": read config.json alone; the weights are random numbers

  // Guess tokens ahead and compute them together; what is generated stays the same, bit for bit. "prompt_lookup"
  // guesses what followed the last prompt_lookup_max (at least prompt_lookup_min) tokens earlier in prompt and output,
  // "draft" what draft_model says, a smaller model of the same vocabulary. Requests with a token_mask go without.
  std::string speculation = "off";
  std::string draft_model = "";  // as path of load(); its weights and KV cache have the model's types
  int64_t max_speculated_tokens = 6;
  int64_t prompt_lookup_min = 2;
  int64_t prompt_lookup_max = 4;
  bool adaptive_speculation = true;  // as many as pay, none where none does; false: always max_speculated_tokens
};

// How the next token is chosen. The defaults are greedy. Applied in this order: token_mask, min_tokens, logit_bias,
// repetition, frequency and presence penalty, temperature, min_p, top_k, top_p.
struct SamplingParams {
  int64_t n = 1;  // completions of the prompt, each with random choices of its own
  int64_t max_new_tokens = 128;
  int64_t min_tokens = 0;           // no end token before so many new ones
  float temperature = 0.0f;         // 0: greedy
  int64_t top_k = 0;                // keep the k likeliest; 0: all
  float top_p = 1.0f;               // keep the likeliest that together reach top_p; 1: all
  float min_p = 0.0f;               // keep those at least min_p times as likely as the likeliest
  float repetition_penalty = 1.0f;  // divides positive logits of tokens in prompt and output, multiplies negative ones
  float presence_penalty = 0.0f;    // taken from the logits of tokens in the output
  float frequency_penalty = 0.0f;   // taken once for each time that a token is in the output
  std::vector<std::pair<int32_t, float>> logit_bias;  // added to the logits of these tokens
  uint64_t seed = 0;                                  // equal seeds give equal tokens
  std::vector<int64_t> stop_token_ids;                // beside the model's own end tokens
  bool ignore_eos = false;
  std::optional<int64_t> logprobs;         // of the chosen token and so many of the likeliest, at every new token
  std::optional<int64_t> prompt_logprobs;  // the same at every token of the prompt but the first

  void validate() const;  // InvalidArgument: "top_p: 1.5 is not in (0, 1]"
};

// Called before a token of completion `index` is chosen, with the tokens that it has so far; leaves in bit v % 32 of
// allowed[v / 32] whether token v may come next. Where none may, the completion ends (kStop). An exception from it
// passes through step(), which has then done nothing and may be called again, for instance after abort().
using TokenMask = std::function<void(int64_t index, std::span<const int32_t> generated, std::span<uint32_t> allowed)>;

struct Request {
  std::vector<int32_t> prompt_token_ids;
  SamplingParams sampling;
  int64_t priority = 0;  // lower ones run first; of equals, who came first
  TokenMask token_mask;  // empty: every token may come next
};

enum class FinishReason { kStop, kLength, kAborted };

struct TokenLogprob {
  int32_t token_id = 0;
  float logprob = 0.0f;  // by the model's own logits, before anything that SamplingParams does to them
};

struct PositionLogprobs {
  TokenLogprob chosen;
  int64_t rank = 0;               // of the chosen one, 1: the likeliest
  std::vector<TokenLogprob> top;  // the likeliest first
};

struct Timings {
  double queue_seconds = 0;    // from add_request to the first step that took the request along
  double prefill_seconds = 0;  // from there to the first new token
  double decode_seconds = 0;   // from there to the last one
};

using RequestId = uint64_t;

// What a step did to one completion.
struct StepOutput {
  RequestId request_id = 0;
  int64_t index = 0;                              // of the completion, in [0, n)
  std::vector<int32_t> new_token_ids;             // several where guesses came true; an end token included
  std::vector<PositionLogprobs> logprobs;         // one for each new token, when asked for
  std::vector<PositionLogprobs> prompt_logprobs;  // with the first output of completion 0, when asked for
  std::optional<FinishReason> finish_reason;      // set once, in the completion's last output
  int64_t num_cached_tokens = 0;                  // of the prompt, that were in the cache when the completion began
  Timings timings;                                // so far
};

struct CompletionOutput {
  std::vector<int32_t> token_ids;  // generated ones, an end token included
  std::vector<PositionLogprobs> logprobs;
  FinishReason finish_reason = FinishReason::kLength;
};

struct RequestOutput {
  std::vector<CompletionOutput> completions;  // [n]
  std::vector<PositionLogprobs> prompt_logprobs;
  int64_t num_cached_tokens = 0;
  Timings timings;  // of completion 0
};

struct EngineStats {
  int64_t num_running = 0;  // completions
  int64_t num_waiting = 0;
  int64_t num_kv_blocks = 0;
  int64_t num_free_kv_blocks = 0;  // those that nobody uses; the prefix cache may still know their contents
  int64_t num_preemptions = 0;     // completions that gave up their blocks, and computed them again later
  // Weights that were packed before are used where they are mapped until a copy in huge pages is complete.
  bool weights_settled = true;
  // Of mapped weights: experts that fit into memory of our own, and that are there; uses of an expert by a forward
  // pass, and those that found it there.
  int64_t expert_cache_capacity = 0, experts_held = 0, expert_uses = 0, expert_hits = 0;
  int64_t num_speculated_tokens = 0;  // guesses that were computed
  int64_t num_accepted_tokens = 0;    // those of them that came true
};

class Engine {
 public:
  // path: a Hugging Face directory (config.json and safetensors) or a .gguf file (of a split one any part).
  // InvalidArgument or CorruptFile say what is wrong with it.
  static std::unique_ptr<Engine> load(const std::string& path, const EngineOptions& options = {});
  virtual ~Engine() = default;

  // Takes a request in; step() works on it. InvalidArgument where it can never run.
  virtual RequestId add_request(Request request) = 0;

  // Forgets a request, or one of its completions; no output of it follows. Nothing happens when it has ended already.
  virtual void abort(RequestId id, std::optional<int64_t> index = {}) = 0;

  // Runs the model once over what max_num_batched_tokens allows; outputs are those of completions that got on.
  virtual std::vector<StepOutput> step() = 0;
  virtual bool has_unfinished() const = 0;

  // Runs one request to its end, when no other is unfinished. on_output (may be empty) sees what every step did;
  // returning false ends that completion with kAborted (that is how stop strings work: the text lives in the caller).
  virtual RequestOutput generate(const Request& request,
                                 const std::function<bool(const StepOutput&)>& on_output = {}) = 0;

  // logits[T * vocab_size], row t after token t, of one sequence from its start.
  virtual std::vector<float> logits(const std::vector<int32_t>& token_ids) = 0;

  // The experts chosen for every token of one sequence: [num_moe_layers][T * top_k].
  virtual std::vector<std::vector<int32_t>> expert_ids(const std::vector<int32_t>& token_ids) = 0;

  // Sum of -log p(token t+1 | tokens up to t) over the sequence, in nats; T - 1 terms, T at most
  // max_model_len() + 1 (the last token is only predicted).
  virtual double negative_log_likelihood(const std::vector<int32_t>& token_ids) = 0;

  virtual int64_t vocab_size() const = 0;
  virtual int64_t max_model_len() const = 0;
  virtual EngineStats stats() const = 0;
  virtual std::string config_json() const = 0;  // as CoterieForCausalLM, see src/model/config.h
};

}  // namespace coterie
