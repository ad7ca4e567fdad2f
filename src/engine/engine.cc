// The engine of one process: runs one sequence at a time, prefill in chunks, then token by token.
#include "coterie/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>

#include "base/log.h"
#include "base/thread_pool.h"
#include "coterie/error.h"
#include "engine/kv_cache.h"
#include "engine/sampler.h"
#include "engine/sequence.h"
#include "model/decoder.h"
#include "model/stored_model.h"
#include "model/weights.h"

namespace coterie {
namespace {

// Tokens of a prompt that run through the layers together: enough rows to keep the matrix kernels
// busy, few enough that the activations stay in cache.
constexpr int64_t kPrefillChunk = 512;
// Rows of logits held at once where only a number per row is wanted.
constexpr int64_t kLogitsChunk = 64;

DType engine_dtype(const std::string& name) {
  if (name != "fp32" && name != "bf16") throw InvalidArgument("dtype: '" + name + "' is not one of fp32, bf16");
  return dtype_from_name(name);
}

int engine_threads(int threads) {
  if (threads < 0) throw InvalidArgument("threads: " + std::to_string(threads) + " is negative");
  return threads > 0 ? threads : available_cpus();
}

int64_t engine_max_model_len(const ModelConfig& config, int64_t wanted) {
  const int64_t most = config.max_position_embeddings;
  if (wanted < 0 || wanted > most) {
    throw InvalidArgument("max_model_len: " + std::to_string(wanted) + " is not in [1, " + std::to_string(most) +
                          "], the positions of the model (0: all)");
  }
  return wanted > 0 ? wanted : most;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// -log softmax(logits)[token]
double negative_log_probability(const float* logits_V, int64_t V, int32_t token) {
  const double most = *std::max_element(logits_V, logits_V + V);
  double sum = 0;
  for (int64_t i = 0; i < V; ++i) sum += std::exp(logits_V[i] - most);
  return most + std::log(sum) - logits_V[token];
}

class EngineImpl : public Engine {
 public:
  EngineImpl(const StoredModel& model, const EngineOptions& options)
      : config_(model.config()),
        max_model_len_(engine_max_model_len(config_, options.max_model_len)),
        pool_(engine_threads(options.threads)),
        weights_(load_weights(config_, model.tensors(), engine_dtype(options.dtype), pool_)),
        decoder_(config_, weights_, pool_),
        cache_(config_, weights_.dtype, KvCache::blocks_for(max_model_len_)) {}

  RequestOutput generate(const Request& request, const std::function<bool(int32_t)>& on_token) override {
    request.sampling.validate();
    check_tokens("prompt_token_ids", request.prompt_token_ids, max_model_len_ - 1);
    Sequence sequence(request, config_.eos_token_ids, max_model_len_, cache_);
    std::vector<float> logits_V(config_.vocab_size);
    RequestOutput output;
    auto start = std::chrono::steady_clock::now();
    while (!sequence.finished()) {
      const bool prefill = !sequence.prefilled();
      const float* hidden_D = advance(sequence);
      if (!sequence.prefilled()) continue;
      decoder_.logits(hidden_D, 1, logits_V.data());
      const int32_t token = sample(logits_V, sequence.sampling(), sequence.num_tokens());
      sequence.append(token);
      if (prefill) output.prefill_seconds = seconds_since(std::exchange(start, std::chrono::steady_clock::now()));
      if (on_token && !on_token(token)) sequence.abort();
    }
    output.decode_seconds = seconds_since(start);
    output.token_ids = sequence.output();
    output.finish_reason = *sequence.finished();
    return output;
  }

  std::vector<float> logits(const std::vector<int32_t>& token_ids) override {
    std::vector<float> logits_TV(token_ids.size() * config_.vocab_size);
    run(token_ids, nullptr, [&](const float* hidden_TD, int64_t first, int64_t T) {
      decoder_.logits(hidden_TD, T, logits_TV.data() + first * config_.vocab_size);
    });
    return logits_TV;
  }

  std::vector<std::vector<int32_t>> expert_ids(const std::vector<int32_t>& token_ids) override {
    RoutingTrace trace;
    run(token_ids, &trace, [](const float*, int64_t, int64_t) {});
    return trace;
  }

  double negative_log_likelihood(const std::vector<int32_t>& token_ids) override {
    // The last token is only predicted, so a sequence may be one longer than the model has positions.
    check_tokens("token_ids", token_ids, max_model_len_ + 1);
    const std::vector<int32_t> inputs(token_ids.begin(), token_ids.end() - 1);
    if (inputs.empty()) return 0;
    const int64_t V = config_.vocab_size;
    std::vector<float> logits_TV(kLogitsChunk * V);
    double sum = 0;
    run(inputs, nullptr, [&](const float* hidden_TD, int64_t first, int64_t T) {
      for (int64_t t = 0; t < T; t += kLogitsChunk) {
        const int64_t rows = std::min(kLogitsChunk, T - t);
        decoder_.logits(hidden_TD + t * config_.hidden_size, rows, logits_TV.data());
        for (int64_t r = 0; r < rows; ++r) {
          sum += negative_log_probability(logits_TV.data() + r * V, V, token_ids[first + t + r + 1]);
        }
      }
    });
    return sum;
  }

  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t max_model_len() const override { return max_model_len_; }
  std::string config_json() const override { return config_.to_json(); }

 private:
  void check_tokens(const std::string& field, const std::vector<int32_t>& ids, int64_t most) const {
    if (ids.empty()) throw InvalidArgument(field + ": empty");
    if (static_cast<int64_t>(ids.size()) > most) {
      throw InvalidArgument(field + ": " + std::to_string(ids.size()) + " tokens, but at most " + std::to_string(most) +
                            " fit max_model_len (" + std::to_string(max_model_len_) + ")");
    }
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] >= 0 && ids[i] < config_.vocab_size) continue;
      throw InvalidArgument(field + "[" + std::to_string(i) + "]: " + std::to_string(ids[i]) + " is not in [0, " +
                            std::to_string(config_.vocab_size) + "), the vocabulary");
    }
  }

  // Runs the next chunk of a sequence; returns the hidden state of its last token.
  const float* advance(Sequence& sequence) {
    const std::span<const int32_t> tokens = sequence.pending(kPrefillChunk);
    const auto T = static_cast<int64_t>(tokens.size());
    sequence.blocks().reserve(sequence.num_computed() + T);
    Batch batch;
    batch.add(tokens, sequence.num_computed(), sequence.blocks().layers());
    sequence.computed(T);
    return decoder_.forward(batch) + (T - 1) * config_.hidden_size;
  }

  // Runs a whole sequence from its start and shows the hidden states chunk by chunk:
  // visit(hidden_TD, position of the first row, T).
  template <typename Visit>
  void run(const std::vector<int32_t>& token_ids, RoutingTrace* trace, const Visit& visit) {
    check_tokens("token_ids", token_ids, max_model_len_);
    BlockTable blocks(cache_);
    const auto num_tokens = static_cast<int64_t>(token_ids.size());
    for (int64_t first = 0; first < num_tokens; first += kPrefillChunk) {
      const int64_t T = std::min(kPrefillChunk, num_tokens - first);
      blocks.reserve(first + T);
      Batch batch;
      batch.add(std::span(token_ids).subspan(first, T), first, blocks.layers());
      visit(decoder_.forward(batch, trace), first, T);
    }
  }

  ModelConfig config_;
  int64_t max_model_len_;
  NativeThreadPool pool_;
  ModelWeights weights_;
  Decoder decoder_;
  KvCache cache_;
};

}  // namespace

std::unique_ptr<Engine> Engine::load(const std::string& path, const EngineOptions& options) {
  const StoredModel model(path);
  auto engine = std::make_unique<EngineImpl>(model, options);
  log_info("engine: " + path + ", " + std::to_string(model.config().num_parameters()) + " parameters, " +
           options.dtype);
  return engine;
}

}  // namespace coterie
