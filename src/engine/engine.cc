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
#include "engine/speculation.h"
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
                              engine_weight_cache(options, settings_, model, path))),
        expert_cache_(make_expert_cache(options, weights_)),
        weight_mover_(make_weight_mover(options, weights_)),
        decoder_(config_, weights_, pool_, expert_cache_.get()),
        cache_(config_, settings_.kv_cache_dtype, settings_.block_size, settings_.num_kv_blocks,
               settings_.enable_prefix_caching),
        scheduler_(cache_, settings_.limits),
        speculator_(make_speculator(options)) {
    if (!stay_mapped(options, weights_)) cache_.provide_memory();
  }

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
    std::vector<ScheduledChunk> chunks = scheduler_.schedule();
    if (chunks.empty()) return {};
    move_weights();
    if (speculator_) {
      measure_cost();
      speculator_->propose(chunks, scheduler_);
    }
    const float* hidden_TD = run_model(chunks);
    std::vector<Continuation> continuations = continuations_of(chunks);
    choice_logits(continuations, hidden_TD);
    fill_masks(continuations);
    gather_prompt_logprobs(chunks, hidden_TD);
    pool_.run(static_cast<int64_t>(continuations.size()), [&](int64_t i, int) { extend(continuations[i]); });
    for (const ScheduledChunk& chunk : chunks) {
      if (chunk.num_logits == 0) chunk.sequence->computed(chunk.num_tokens);
    }
    std::vector<StepOutput> outputs;
    for (Continuation& continuation : continuations) outputs.push_back(finish_step(continuation));
    scheduler_.remove_finished();
    return outputs;
  }

  RequestOutput generate(const Request& request, const std::function<bool(const StepOutput&)>& on_output) override {
    if (has_unfinished()) throw InvalidArgument("generate: requests of add_request are unfinished");
    const RequestId id = add_request(request);
    RequestOutput result;
    result.completions.resize(request.sampling.n);
    try {
      while (has_unfinished()) {
        for (StepOutput& output : step()) {
          collect(output, result);
          if (on_output && !on_output(output)) abort(id, output.index);
        }
      }
    } catch (...) {  // of a mask, or of on_output
      abort(id, {});
      throw;
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
    stats.num_speculated_tokens = num_speculated_tokens_, stats.num_accepted_tokens = num_accepted_tokens_;
    if (!expert_cache_) return stats;
    const ExpertCache::Stats experts = expert_cache_->stats();
    stats.expert_cache_capacity = experts.capacity, stats.experts_held = experts.held;
    stats.expert_uses = experts.uses, stats.expert_hits = experts.hits;
    return stats;
  }
  std::string config_json() const override { return config_.to_json(); }
  const WeightTypes& types() const { return settings_.types; }

 private:
  static void collect(StepOutput& output, RequestOutput& result) {
    CompletionOutput& completion = result.completions[output.index];
    completion.token_ids.insert(completion.token_ids.end(), output.new_token_ids.begin(), output.new_token_ids.end());
    std::ranges::move(output.logprobs, std::back_inserter(completion.logprobs));
    completion.finish_reason = output.finish_reason.value_or(FinishReason::kAborted);
    if (output.index != 0) return;
    result.num_cached_tokens = output.num_cached_tokens;
    result.timings = output.timings;
    std::ranges::move(output.prompt_logprobs, std::back_inserter(result.prompt_logprobs));
  }

  void move_weights() {
    if (weight_mover_ && weight_mover_->move_if_ready()) weight_mover_.reset();
  }

  std::unique_ptr<Speculator> make_speculator(const EngineOptions& options) {
    const SpeculationKind kind = settings_.speculation.kind;
    if (kind == SpeculationKind::kOff) return nullptr;
    std::unique_ptr<DraftModel> draft;
    if (kind == SpeculationKind::kDraft) {
      draft = std::make_unique<DraftModel>(options, settings_, config_.vocab_size, pool_);
    }
    const StepCost cost(config_, types_in_memory(settings_.types, weights_));
    return std::make_unique<Speculator>(settings_.speculation, cost, std::move(draft));
  }

  // Once, when the weights are where they stay.
  void measure_cost() {
    if (cost_measured_ || weight_mover_ || cache_.num_free() == 0 || !speculator_->measure_draft()) return;
    speculator_->set_cost(measure_step_cost(config_, types_in_memory(settings_.types, weights_), decoder_, cache_));
    cost_measured_ = true;
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
    const int64_t most = prompt + std::min(sampling.max_new_tokens, settings_.max_model_len - prompt);
    const int64_t needed = cache_.blocks_for(most - 1);  // the last token is only chosen
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
      Sequence& sequence = *chunk.sequence;
      batch.add(chunk.token_ids(), sequence.num_computed(), sequence.blocks().layers(), sequence.start_length());
    }
    return decoder_.forward(batch);
  }

  // What a step adds to a sequence whose tokens are all computed: the token behind them, and as long as the proposal
  // has just that token, the one behind it.
  struct Continuation {
    const ScheduledChunk* chunk = nullptr;
    int64_t first_row = 0;          // of the step, whose logits are wanted
    std::span<float> logits_RV;     // of chunk->num_logits rows
    std::vector<uint32_t> allowed;  // empty: every token
    StepOutput output;
  };

  static std::vector<Continuation> continuations_of(const std::vector<ScheduledChunk>& chunks) {
    std::vector<Continuation> continuations;
    int64_t row = 0;
    for (const ScheduledChunk& chunk : chunks) {
      row += chunk.num_tokens;
      if (chunk.num_logits > 0) continuations.push_back({&chunk, row - chunk.num_logits, {}, {}, {}});
    }
    return continuations;
  }

  // Valid until the next step.
  void choice_logits(std::vector<Continuation>& continuations, const float* hidden_TD) {
    const int64_t D = config_.hidden_size, V = config_.vocab_size;
    int64_t C = 0;
    for (const Continuation& continuation : continuations) C += continuation.chunk->num_logits;
    hidden_CD_.reserve(C * D * sizeof(float));
    logits_CV_.reserve(C * V * sizeof(float));
    float* hidden_CD = hidden_CD_.as<float>();
    float* logits_CV = logits_CV_.as<float>();
    for (Continuation& continuation : continuations) {
      const int64_t rows = continuation.chunk->num_logits;
      hidden_CD = std::copy_n(hidden_TD + continuation.first_row * D, rows * D, hidden_CD);
      continuation.logits_RV = {logits_CV, static_cast<size_t>(rows * V)};
      logits_CV += rows * V;
    }
    if (C > 0) decoder_.logits(hidden_CD_.as<float>(), C, logits_CV_.as<float>());
  }

  void fill_masks(std::vector<Continuation>& continuations) const {
    for (Continuation& continuation : continuations) {
      Sequence& sequence = *continuation.chunk->sequence;
      const TokenMask& mask = sequence.shared().request.token_mask;
      if (!mask) continue;
      continuation.allowed.assign((config_.vocab_size + 31) / 32, 0);
      mask(sequence.index(), sequence.output(), continuation.allowed);
    }
  }

  // The sequence gets its tokens, each chosen as if no proposal were there.
  void extend(Continuation& continuation) const {
    const ScheduledChunk& chunk = *continuation.chunk;
    Sequence& sequence = *chunk.sequence;
    std::vector<int32_t>& new_token_ids = continuation.output.new_token_ids;
    for (int64_t i = 0; i < chunk.num_logits; ++i) {
      const int32_t token = choose(continuation, i);
      if (token == kNoToken) return sequence.finish(FinishReason::kStop);
      sequence.append(token);
      new_token_ids.push_back(token);
      if (sequence.finished() || i + 1 == chunk.num_logits || token != chunk.proposal[i]) return;
    }
  }

  // The token behind row i, for a sequence that has all before it.
  int32_t choose(Continuation& continuation, int64_t i) const {
    const Sequence& sequence = *continuation.chunk->sequence;
    const SamplingParams& sampling = sequence.sampling();
    const std::span<float> logits_V = continuation.logits_RV.subspan(i * config_.vocab_size, config_.vocab_size);
    std::vector<float> raw_V;
    if (sampling.logprobs) raw_V.assign(logits_V.begin(), logits_V.end());
    change_logits({sampling, sequence.counts(), continuation.allowed, sequence.end_token_ids(), sequence.may_end()},
                  logits_V);
    const int32_t token = sample(logits_V, sampling, sequence.index(), sequence.num_tokens());
    if (sampling.logprobs && token != kNoToken) {
      continuation.output.logprobs.push_back(position_logprobs(raw_V, token, *sampling.logprobs));
    }
    return token;
  }

  // What the caller is told. What was computed for wrong guesses is forgotten.
  StepOutput finish_step(Continuation& continuation) {
    const ScheduledChunk& chunk = *continuation.chunk;
    Sequence& sequence = *chunk.sequence;
    StepOutput& output = continuation.output;
    const auto guessed = static_cast<int64_t>(chunk.proposal.size());
    const int64_t accepted = std::max<int64_t>(static_cast<int64_t>(output.new_token_ids.size()) - 1, 0);
    num_speculated_tokens_ += guessed;
    num_accepted_tokens_ += accepted;
    output.prompt_logprobs = std::exchange(sequence.prompt_logprobs, {});
    sequence.computed(chunk.num_tokens - guessed + accepted);
    output.request_id = sequence.id();
    output.index = sequence.index();
    output.finish_reason = sequence.finished();
    output.num_cached_tokens = sequence.num_cached_tokens();
    output.timings = sequence.timings();
    return std::move(output);
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
    if (cache_.blocks_for(num_tokens) > cache_.num_blocks()) {
      throw InvalidArgument("token_ids: " + std::to_string(num_tokens) + " tokens need " +
                            std::to_string(cache_.blocks_for(num_tokens)) + " blocks of the KV cache, which has " +
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
  std::unique_ptr<Speculator> speculator_;  // or null
  bool cost_measured_ = false;
  RequestId last_id_ = 0;
  int64_t num_speculated_tokens_ = 0, num_accepted_tokens_ = 0;
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
