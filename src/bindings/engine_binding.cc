#include "bindings/engine_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>

#include "bindings/numpy.h"
#include "coterie/engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace coterie {
namespace {

using TokenIds = std::vector<int32_t>;

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kAborted:
      return "aborted";
  }
  return "";
}

std::unique_ptr<Engine> load_engine(const std::string& path, const std::string& dtype, int threads,
                                    int64_t max_model_len, int64_t max_num_seqs, int64_t max_num_batched_tokens,
                                    const std::string& kv_cache_dtype, int64_t block_size, int64_t num_kv_blocks,
                                    int64_t kv_cache_bytes, bool enable_prefix_caching,
                                    const std::string& attention_dtype, const std::string& head_dtype,
                                    bool weight_cache, const std::string& weight_cache_dir, bool mmap,
                                    const std::string& load_format, int64_t expert_cache_bytes,
                                    const std::string& speculation, const std::string& draft_model,
                                    int64_t max_speculated_tokens, int64_t prompt_lookup_min, int64_t prompt_lookup_max,
                                    bool adaptive_speculation) {
  nb::gil_scoped_release release;
  return Engine::load(path, {.dtype = dtype,
                             .attention_dtype = attention_dtype,
                             .head_dtype = head_dtype,
                             .weight_cache = weight_cache,
                             .weight_cache_dir = weight_cache_dir,
                             .mmap = mmap,
                             .expert_cache_bytes = expert_cache_bytes,
                             .threads = threads,
                             .max_model_len = max_model_len,
                             .max_num_seqs = max_num_seqs,
                             .max_num_batched_tokens = max_num_batched_tokens,
                             .kv_cache_dtype = kv_cache_dtype,
                             .block_size = block_size,
                             .num_kv_blocks = num_kv_blocks,
                             .kv_cache_bytes = kv_cache_bytes,
                             .enable_prefix_caching = enable_prefix_caching,
                             .load_format = load_format,
                             .speculation = speculation,
                             .draft_model = draft_model,
                             .max_speculated_tokens = max_speculated_tokens,
                             .prompt_lookup_min = prompt_lookup_min,
                             .prompt_lookup_max = prompt_lookup_max,
                             .adaptive_speculation = adaptive_speculation});
}

// function(index, generated, allowed) with views that live as long as the call. The engine lets go of a mask on
// whatever thread it runs.
TokenMask token_mask(nb::object function) {
  if (function.is_none()) return {};
  const std::shared_ptr<nb::object> held(new nb::object(std::move(function)), [](nb::object* object) {
    nb::gil_scoped_acquire acquire;
    delete object;
  });
  return [held](int64_t index, std::span<const int32_t> generated, std::span<uint32_t> allowed) {
    nb::gil_scoped_acquire acquire;
    const size_t num_generated = generated.size(), num_words = allowed.size();
    const nb::ndarray<nb::numpy, const int32_t> generated_view(generated.data(), 1, &num_generated, nb::handle());
    const nb::ndarray<nb::numpy, uint32_t> allowed_view(allowed.data(), 1, &num_words, nb::handle());
    (*held)(index, nb::cast(generated_view, nb::rv_policy::reference),
            nb::cast(allowed_view, nb::rv_policy::reference));
  };
}

RequestId add_request(Engine& engine, TokenIds token_ids, const SamplingParams& sampling, int64_t priority,
                      nb::object mask) {
  return engine.add_request({std::move(token_ids), sampling, priority, token_mask(std::move(mask))});
}

nb::ndarray<nb::numpy, float> logits(Engine& engine, const TokenIds& token_ids) {
  std::vector<float> values;
  {
    nb::gil_scoped_release release;
    values = engine.logits(token_ids);
  }
  return to_numpy(std::move(values), {static_cast<int64_t>(token_ids.size()), engine.vocab_size()});
}

nb::list expert_ids(Engine& engine, const TokenIds& token_ids) {
  std::vector<std::vector<int32_t>> layers;
  {
    nb::gil_scoped_release release;
    layers = engine.expert_ids(token_ids);
  }
  nb::list result;
  const auto T = static_cast<int64_t>(token_ids.size());
  for (std::vector<int32_t>& ids : layers) {
    const auto K = static_cast<int64_t>(ids.size()) / T;
    result.append(to_numpy(std::move(ids), {T, K}));
  }
  return result;
}

nb::dict stats(const Engine& engine) {
  const EngineStats stats = engine.stats();
  nb::dict result;
  result["num_running"] = stats.num_running;
  result["num_waiting"] = stats.num_waiting;
  result["num_kv_blocks"] = stats.num_kv_blocks;
  result["num_free_kv_blocks"] = stats.num_free_kv_blocks;
  result["num_preemptions"] = stats.num_preemptions;
  result["weights_settled"] = stats.weights_settled;
  result["expert_cache_capacity"] = stats.expert_cache_capacity;
  result["experts_held"] = stats.experts_held;
  result["expert_uses"] = stats.expert_uses;
  result["expert_hits"] = stats.expert_hits;
  result["num_speculated_tokens"] = stats.num_speculated_tokens;
  result["num_accepted_tokens"] = stats.num_accepted_tokens;
  return result;
}

void bind_structs(nb::module_& m) {
  nb::class_<SamplingParams>(m, "SamplingParams")
      .def(nb::init<>())
      .def("validate", &SamplingParams::validate)
      .def_rw("n", &SamplingParams::n)
      .def_rw("max_new_tokens", &SamplingParams::max_new_tokens)
      .def_rw("min_tokens", &SamplingParams::min_tokens)
      .def_rw("temperature", &SamplingParams::temperature)
      .def_rw("top_k", &SamplingParams::top_k)
      .def_rw("top_p", &SamplingParams::top_p)
      .def_rw("min_p", &SamplingParams::min_p)
      .def_rw("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_rw("presence_penalty", &SamplingParams::presence_penalty)
      .def_rw("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_rw("logit_bias", &SamplingParams::logit_bias)
      .def_rw("seed", &SamplingParams::seed)
      .def_rw("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_rw("ignore_eos", &SamplingParams::ignore_eos)
      .def_rw("logprobs", &SamplingParams::logprobs, "value"_a.none())
      .def_rw("prompt_logprobs", &SamplingParams::prompt_logprobs, "value"_a.none());
  nb::class_<TokenLogprob>(m, "TokenLogprob")
      .def_ro("token_id", &TokenLogprob::token_id)
      .def_ro("logprob", &TokenLogprob::logprob);
  nb::class_<PositionLogprobs>(m, "PositionLogprobs")
      .def_ro("chosen", &PositionLogprobs::chosen)
      .def_ro("rank", &PositionLogprobs::rank)
      .def_ro("top", &PositionLogprobs::top);
  nb::class_<Timings>(m, "Timings")
      .def_ro("queue_seconds", &Timings::queue_seconds)
      .def_ro("prefill_seconds", &Timings::prefill_seconds)
      .def_ro("decode_seconds", &Timings::decode_seconds);
  nb::class_<StepOutput>(m, "StepOutput")
      .def_ro("request_id", &StepOutput::request_id)
      .def_ro("index", &StepOutput::index)
      .def_ro("new_token_ids", &StepOutput::new_token_ids)
      .def_ro("logprobs", &StepOutput::logprobs)
      .def_ro("prompt_logprobs", &StepOutput::prompt_logprobs)
      .def_prop_ro("finish_reason",
                   [](const StepOutput& output) -> std::optional<std::string> {
                     if (!output.finish_reason) return {};
                     return finish_reason_name(*output.finish_reason);
                   })
      .def_ro("num_cached_tokens", &StepOutput::num_cached_tokens)
      .def_ro("timings", &StepOutput::timings);
}

}  // namespace

void bind_engine(nb::module_& m) {
  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();
  const EngineOptions defaults;
  bind_structs(m);
  nb::class_<Engine>(m, "Engine")
      .def(nb::new_(&load_engine), "path"_a, "dtype"_a = defaults.dtype, "threads"_a = defaults.threads,
           "max_model_len"_a = defaults.max_model_len, "max_num_seqs"_a = defaults.max_num_seqs,
           "max_num_batched_tokens"_a = defaults.max_num_batched_tokens, "kv_cache_dtype"_a = defaults.kv_cache_dtype,
           "block_size"_a = defaults.block_size, "num_kv_blocks"_a = defaults.num_kv_blocks,
           "kv_cache_bytes"_a = defaults.kv_cache_bytes, "enable_prefix_caching"_a = defaults.enable_prefix_caching,
           "attention_dtype"_a = defaults.attention_dtype, "head_dtype"_a = defaults.head_dtype,
           "weight_cache"_a = defaults.weight_cache, "weight_cache_dir"_a = defaults.weight_cache_dir,
           "mmap"_a = defaults.mmap, "load_format"_a = defaults.load_format,
           "expert_cache_bytes"_a = defaults.expert_cache_bytes, "speculation"_a = defaults.speculation,
           "draft_model"_a = defaults.draft_model, "max_speculated_tokens"_a = defaults.max_speculated_tokens,
           "prompt_lookup_min"_a = defaults.prompt_lookup_min, "prompt_lookup_max"_a = defaults.prompt_lookup_max,
           "adaptive_speculation"_a = defaults.adaptive_speculation)
      .def("add_request", &add_request, "token_ids"_a, "sampling"_a, "priority"_a = 0, "token_mask"_a = nb::none())
      .def("abort", &Engine::abort, "request_id"_a, "index"_a = nb::none(), no_gil)
      .def("step", &Engine::step, no_gil)
      .def("has_unfinished", &Engine::has_unfinished)
      .def("stats", &stats)
      .def("logits", &logits, "token_ids"_a)
      .def("expert_ids", &expert_ids, "token_ids"_a)
      .def("negative_log_likelihood", &Engine::negative_log_likelihood, "token_ids"_a, no_gil)
      .def_prop_ro("vocab_size", &Engine::vocab_size)
      .def_prop_ro("max_model_len", &Engine::max_model_len)
      .def_prop_ro("config_json", &Engine::config_json);
}

}  // namespace coterie
