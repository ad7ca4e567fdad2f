// The engine of one process: a step runs the scheduler's chunks through the model, and chooses a token for each
// completion whose tokens are all computed.
#include "coterie/engine.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/log.h"
#include "base/thread_pool.h"
#include "coterie/error.h"
#include "engine/kv_cache.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/settings.h"
#include "kernels/kernel_table.h"
#include "model/decoder.h"
#include "model/stored_model.h"
#include "model/weights.h"

namespace coterie {
namespace {

// Tokens of one sequence that run through the layers together where a whole sequence is looked at.
constexpr int64_t kSequenceChunk = 512;
// Rows of logits held at once where only a number per row is wanted.
constexpr int64_t kLogitsChunk = 64;

// -log softmax(logits)[token]; overwrites the logits.
double negative_log_probability(float* logits_V, int64_t V, int32_t token) {
  const double chosen = logits_V[token];
  const SoftmaxSum softmax = active_kernels().exponentials_row(logits_V, V, 1.0f, logits_V, DType::kF32);
  return softmax.maximum + std::log(static_cast<double>(softmax.sum)) - chosen;
}

class EngineImpl : public Engine {
 public:
  EngineImpl(const StoredModel& model, const EngineOptions& options, const std::string& path)
      : config_(model.config()),
        settings_(engine_settings(options, model)),
        pool_(settings_.threads),
        weights_(load_weights(config_, model.tensors(), settings_.types, pool_,
                              engine_weight_cache(options, settings_, config_, path))),
        expert_cache_(make_expert_cache(options, weights_)),
        weight_mover_(make_weight_mover(options, weights_)),
        decoder_(config_, weights_, pool_, expert_cache_.get()),
        cache_(config_, settings_.kv_cache_dtype, settings_.num_kv_blocks, settings_.enable_prefix_caching),
        scheduler_(cache_, settings_.limits) {}

  RequestId add_request(Request request) override {
    check_request(request);
    auto shared = std::make_shared<SharedRequest>();
    shared->id = ++last_id_;
    shared->end_token_ids = request.sampling.stop_token_ids;
    if (!request.sampling.ignore_eos) {
      shared->end_token_ids.insert(shared->end_token_ids.end(), config_.eos_token_ids.begin(),
                                   config_.eos_token_ids.end());
    }
    shared->max_model_len = settings_.max_model_len;
    shared->request = std::move(request);
    for (int64_t i = 0; i < shared->request.sampling.n; ++i) {
      scheduler_.add(std::make_unique<Sequence>(shared, i, cache_));
    }
    return shared->id;
  }

  void abort(RequestId id, std::optional<int64_t> index) override { scheduler_.remove(id, index); }
  bool has_unfinished() const override { return !scheduler_.empty(); }

  std::vector<StepOutput> step() override {
    const std::vector<ScheduledChunk> chunks = scheduler_.schedule();
    if (chunks.empty()) return {};
    move_weights();
    const float* hidden_TD = run_model(chunks);
    std::vector<Choice> choices = choices_of(chunks);
    const std::span<float> logits_CV = choice_logits(choices, hidden_TD);
    fill_masks(choices);
    gather_prompt_logprobs(chunks, hidden_TD);
    pool_.run(static_cast<int64_t>(choices.size()), [&](int64_t c, int) {
      choose(choices[c], logits_CV.subspan(c * config_.vocab_size, config_.vocab_size));
    });
    for (const ScheduledChunk& chunk : chunks) chunk.sequence->computed(chunk.num_tokens);
    std::vector<StepOutput> outputs;
    for (Choice& choice : choices) outputs.push_back(take(choice));
    scheduler_.remove_finished();
    return outputs;
  }

  RequestOutput generate(const Request& request, const std::function<bool(const StepOutput&)>& on_output) override {
    if (has_unfinished()) throw InvalidArgument("generate: requests of add_request are unfinished");
    const RequestId id = add_request(request);
    RequestOutput result;
    result.completions.resize(request.sampling.n);
    while (has_unfinished()) {
      for (StepOutput& output : step()) {
        CompletionOutput& completion = result.completions[output.index];
        completion.token_ids.insert(completion.token_ids.end(), output.new_token_ids.begin(),
                                    output.new_token_ids.end());
        std::ranges::move(output.logprobs, std::back_inserter(completion.logprobs));
        completion.finish_reason = output.finish_reason.value_or(FinishReason::kAborted);
        if (output.index == 0) {
          result.num_cached_tokens = output.num_cached_tokens;
          result.timings = output.timings;
          std::ranges::move(output.prompt_logprobs, std::back_inserter(result.prompt_logprobs));
        }
        if (on_output && !on_output(output)) abort(id, output.index);
      }
    }
    return result;
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
    check_tokens("token_ids", token_ids, settings_.max_model_len + 1);
    const std::vector<int32_t> inputs(token_ids.begin(), token_ids.end() - 1);
    if (inputs.empty()) return 0;
    const int64_t V = config_.vocab_size;
    std::vector<float> logits_TV(kLogitsChunk * V);
    std::vector<double> losses(kLogitsChunk);
    double sum = 0;
    run(inputs, nullptr, [&](const float* hidden_TD, int64_t first, int64_t T) {
      for (int64_t t = 0; t < T; t += kLogitsChunk) {
        const int64_t rows = std::min(kLogitsChunk, T - t);
        decoder_.logits(hidden_TD + t * config_.hidden_size, rows, logits_TV.data());
        pool_.run(rows, [&](int64_t r, int) {
          losses[r] = negative_log_probability(logits_TV.data() + r * V, V, token_ids[first + t + r + 1]);
        });
        for (int64_t r = 0; r < rows; ++r) sum += losses[r];
      }
    });
    return sum;
  }

  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t max_model_len() const override { return settings_.max_model_len; }
  EngineStats stats() const override {
    EngineStats stats = {scheduler_.num_running(), scheduler_.num_waiting(), cache_.num_blocks(), cache_.num_free(),
                         scheduler_.num_preemptions()};
    stats.weights_settled = !weight_mover_;
    if (!expert_cache_) return stats;
    const ExpertCache::Stats experts = expert_cache_->stats();
    stats.expert_cache_capacity = experts.capacity, stats.experts_held = experts.held;
    stats.expert_uses = experts.uses, stats.expert_hits = experts.hits;
    return stats;
  }
  std::string config_json() const override { return config_.to_json(); }
  const WeightTypes& types() const { return settings_.types; }

 private:
  void move_weights() {
    if (weight_mover_ && weight_mover_->move_if_ready()) weight_mover_.reset();
  }

  void check_tokens(const std::string& field, const std::vector<int32_t>& ids, int64_t most) const {
    if (ids.empty()) throw InvalidArgument(field + ": empty");
    if (static_cast<int64_t>(ids.size()) > most) {
      throw InvalidArgument(field + ": " + std::to_string(ids.size()) + " tokens, but at most " + std::to_string(most) +
                            " fit max_model_len (" + std::to_string(settings_.max_model_len) + ")");
    }
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] >= 0 && ids[i] < config_.vocab_size) continue;
      throw InvalidArgument(field + "[" + std::to_string(i) + "]: " + std::to_string(ids[i]) + " is not in [0, " +
                            std::to_string(config_.vocab_size) + "), the vocabulary");
    }
  }

  void check_request(const Request& request) const {
    const SamplingParams& sampling = request.sampling;
    sampling.validate();
    check_tokens("prompt_token_ids", request.prompt_token_ids, settings_.max_model_len - 1);
    for (const auto& [token, bias] : sampling.logit_bias) {
      if (token >= 0 && token < config_.vocab_size) continue;
      throw InvalidArgument("logit_bias: " + std::to_string(token) + " is not in [0, " +
                            std::to_string(config_.vocab_size) + "), the vocabulary");
    }
    const auto prompt = static_cast<int64_t>(request.prompt_token_ids.size());
    const int64_t most = std::min(prompt + sampling.max_new_tokens, settings_.max_model_len);
    const int64_t needed = KvCache::blocks_for(most - 1);  // the last token is only chosen
    if (needed > cache_.num_blocks()) {
      throw InvalidArgument("prompt_token_ids: " + std::to_string(prompt) + " tokens and max_new_tokens (" +
                            std::to_string(sampling.max_new_tokens) + ") need " + std::to_string(needed) +
                            " blocks of the KV cache, which has " + std::to_string(cache_.num_blocks()));
    }
  }

  // The final hidden states [T, D] of all chunks, one behind the other.
  const float* run_model(const std::vector<ScheduledChunk>& chunks) {
    Batch batch;
    for (const ScheduledChunk& chunk : chunks) {
      const Sequence& sequence = *chunk.sequence;
      batch.add(sequence.token_ids().subspan(sequence.num_computed(), chunk.num_tokens), sequence.num_computed(),
                chunk.sequence->blocks().layers(), sequence.num_prompt_tokens());
    }
    return decoder_.forward(batch);
  }

  // A token to choose: behind row `row` of the step, for a sequence.
  struct Choice {
    Sequence* sequence = nullptr;
    int64_t row = 0;
    std::vector<uint32_t> allowed;  // empty: every token
    int32_t token = kNoToken;
    std::optional<PositionLogprobs> logprobs;
  };

  static std::vector<Choice> choices_of(const std::vector<ScheduledChunk>& chunks) {
    std::vector<Choice> choices;
    int64_t row = 0;
    for (const ScheduledChunk& chunk : chunks) {
      row += chunk.num_tokens;
      for (int64_t i = chunk.num_logits; i > 0; --i) choices.push_back({chunk.sequence, row - i});
    }
    return choices;
  }

  // Valid until the next step.
  std::span<float> choice_logits(const std::vector<Choice>& choices, const float* hidden_TD) {
    const int64_t C = static_cast<int64_t>(choices.size()), D = config_.hidden_size, V = config_.vocab_size;
    hidden_CD_.reserve(C * D * sizeof(float));
    logits_CV_.reserve(C * V * sizeof(float));
    for (int64_t c = 0; c < C; ++c) {
      const float* hidden_D = hidden_TD + choices[c].row * D;
      std::copy(hidden_D, hidden_D + D, hidden_CD_.as<float>() + c * D);
    }
    if (C > 0) decoder_.logits(hidden_CD_.as<float>(), C, logits_CV_.as<float>());
    return {logits_CV_.as<float>(), static_cast<size_t>(C * V)};
  }

  void fill_masks(std::vector<Choice>& choices) const {
    for (Choice& choice : choices) {
      const TokenMask& mask = choice.sequence->shared().request.token_mask;
      if (!mask) continue;
      choice.allowed.assign((config_.vocab_size + 31) / 32, 0);
      mask(choice.sequence->index(), choice.sequence->output(), choice.allowed);
    }
  }

  static void choose(Choice& choice, std::span<float> logits_V) {
    const Sequence& sequence = *choice.sequence;
    const SamplingParams& sampling = sequence.sampling();
    std::vector<float> raw_V;
    if (sampling.logprobs) raw_V.assign(logits_V.begin(), logits_V.end());
    change_logits({sampling, sequence.counts(), choice.allowed, sequence.end_token_ids(), sequence.may_end()},
                  logits_V);
    choice.token = sample(logits_V, sampling, sequence.index(), sequence.num_tokens());
    if (sampling.logprobs && choice.token != kNoToken) {
      choice.logprobs = position_logprobs(raw_V, choice.token, *sampling.logprobs);
    }
  }

  // The sequence gets its token; what the caller is told of it.
  static StepOutput take(Choice& choice) {
    Sequence& sequence = *choice.sequence;
    StepOutput output;
    output.request_id = sequence.id();
    output.index = sequence.index();
    if (choice.token == kNoToken) {
      sequence.finish(FinishReason::kStop);
    } else {
      sequence.append(choice.token);
      output.new_token_ids = {choice.token};
    }
    if (choice.logprobs) output.logprobs.push_back(std::move(*choice.logprobs));
    if (sequence.index() == 0) sequence.shared().prompt_computed = true;
    output.prompt_logprobs = std::exchange(sequence.prompt_logprobs, {});
    output.finish_reason = sequence.finished();
    output.num_cached_tokens = sequence.num_cached_tokens();
    output.timings = sequence.timings();
    return output;
  }

  void gather_prompt_logprobs(const std::vector<ScheduledChunk>& chunks, const float* hidden_TD) {
    int64_t row = 0;
    for (const ScheduledChunk& chunk : chunks) {
      Sequence& sequence = *chunk.sequence;
      const int64_t first = sequence.num_computed();
      // Row t predicts token t + 1.
      const int64_t rows = std::min(chunk.num_tokens, sequence.num_prompt_tokens() - 1 - first);
      if (sequence.sampling().prompt_logprobs && sequence.index() == 0 && sequence.output().empty()) {
        add_logprobs(hidden_TD + row * config_.hidden_size,
                     sequence.token_ids().subspan(first + 1, std::max<int64_t>(rows, 0)),
                     *sequence.sampling().prompt_logprobs, sequence.prompt_logprobs);
      }
      row += chunk.num_tokens;
    }
  }

  // Of token_ids_T[t] by row t, appended to `out`.
  void add_logprobs(const float* hidden_TD, std::span<const int32_t> token_ids_T, int64_t num_top,
                    std::vector<PositionLogprobs>& out) {
    const int64_t V = config_.vocab_size;
    std::vector<float> logits_RV(kLogitsChunk * V);
    const auto T = static_cast<int64_t>(token_ids_T.size());
    const auto start = static_cast<int64_t>(out.size());
    out.resize(start + T);
    for (int64_t t = 0; t < T; t += kLogitsChunk) {
      const int64_t rows = std::min(kLogitsChunk, T - t);
      decoder_.logits(hidden_TD + t * config_.hidden_size, rows, logits_RV.data());
      pool_.run(rows, [&](int64_t r, int) {
        out[start + t + r] = position_logprobs(std::span(logits_RV).subspan(r * V, V), token_ids_T[t + r], num_top);
      });
    }
  }

  // Runs a whole sequence from its start and shows the hidden states chunk by chunk:
  // visit(hidden_TD, position of the first row, T).
  template <typename Visit>
  void run(const std::vector<int32_t>& token_ids, RoutingTrace* trace, const Visit& visit) {
    check_tokens("token_ids", token_ids, settings_.max_model_len);
    move_weights();
    const auto num_tokens = static_cast<int64_t>(token_ids.size());
    if (KvCache::blocks_for(num_tokens) > cache_.num_blocks()) {
      throw InvalidArgument("token_ids: " + std::to_string(num_tokens) + " tokens need " +
                            std::to_string(KvCache::blocks_for(num_tokens)) + " blocks of the KV cache, which has " +
                            std::to_string(cache_.num_blocks()));
    }
    BlockTable blocks(cache_);
    for (int64_t first = 0; first < num_tokens; first += kSequenceChunk) {
      const int64_t T = std::min(kSequenceChunk, num_tokens - first);
      blocks.reserve(first + T);
      Batch batch;
      batch.add(std::span(token_ids).subspan(first, T), first, blocks.layers(), num_tokens);
      visit(decoder_.forward(batch, trace), first, T);
    }
  }

  ModelConfig config_;
  EngineSettings settings_;
  NativeThreadPool pool_;
  ModelWeights weights_;
  std::unique_ptr<ExpertCache> expert_cache_;  // or null
  std::unique_ptr<WeightMover> weight_mover_;  // null when all are where they stay
  Decoder decoder_;
  KvCache cache_;
  Scheduler scheduler_;
  RequestId last_id_ = 0;
  AlignedBuffer hidden_CD_, logits_CV_;  // of a step's choices; kept, since fresh memory costs more than filling it
};

}  // namespace

std::unique_ptr<Engine> Engine::load(const std::string& path, const EngineOptions& options) {
  const StoredModel model(path, load_format(options.load_format));
  auto engine = std::make_unique<EngineImpl>(model, options, path);
  log_info("engine: " + path + ", " + std::to_string(model.config().num_parameters()) + " parameters, " +
           engine->types().description());
  return engine;
}

}  // namespace coterie
