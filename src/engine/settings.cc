#include "engine/settings.h"

#include <algorithm>
#include <string>

#include "base/log.h"
#include "base/machine.h"
#include "base/round.h"
#include "coterie/error.h"
#include "engine/kv_cache.h"
#include "kernels/panels.h"

namespace coterie {
namespace {

// Models below this many parameters are packed in the time that it takes to look for a file.
constexpr int64_t kSmallModel = 16'000'000;

// By itself in few bits where attention's weights are. Rows of latent attention hold two things under one factor.
DType cache_dtype(const std::string& name, const WeightTypes& types, const ModelConfig& config) {
  if (name == "auto") return is_quantized(types.attention) && !config.is_latent() ? DType::kI8 : types.dtype();
  if (name == "int8") return DType::kI8;
  if (name == "fp32" || name == "bf16") return dtype_from_name(name);
  throw InvalidArgument("kv_cache_dtype: '" + name + "' is not one of auto, fp32, bf16, int8");
}

int64_t at_least(const char* field, int64_t value, int64_t least) {
  if (value >= least) return value;
  throw InvalidArgument(std::string(field) + ": " + std::to_string(value) +
                        (least == 0 ? " is negative" : " is below " + std::to_string(least)));
}

int64_t block_size(int64_t wanted) {
  constexpr int64_t kUnit = 16, kMost = 1024;  // rows that attention reads together; larger blocks share less
  if (wanted > 0 && wanted <= kMost && wanted % kUnit == 0) return wanted;
  throw InvalidArgument("block_size: " + std::to_string(wanted) + " is not a multiple of " + std::to_string(kUnit) +
                        " up to " + std::to_string(kMost));
}

int64_t model_len(const ModelConfig& config, int64_t wanted) {
  const int64_t most = config.max_context();
  if (wanted < 0 || wanted > most) {
    throw InvalidArgument("max_model_len: " + std::to_string(wanted) + " is not in [1, " + std::to_string(most) +
                          "], the positions of the model (0: all)");
  }
  return wanted > 0 ? wanted : most;
}

int64_t quarter_of_memory() { return available_memory() / 4; }
// Of weights; a quarter is left to keys and values.
int64_t most_in_memory() { return available_memory() / 4 * 3; }

FileStore* file_of(const ModelWeights& weights) { return dynamic_cast<FileStore*>(weights.store.get()); }

int64_t kv_blocks(const EngineOptions& options, const EngineSettings& settings, const ModelConfig& config) {
  at_least("num_kv_blocks", options.num_kv_blocks, 0);
  at_least("kv_cache_bytes", options.kv_cache_bytes, 0);
  if (options.num_kv_blocks > 0) return options.num_kv_blocks;
  const int64_t block_bytes = KvCache::block_bytes(config, settings.kv_cache_dtype, settings.block_size);
  if (options.kv_cache_bytes > 0) {
    if (options.kv_cache_bytes >= block_bytes) return options.kv_cache_bytes / block_bytes;
    throw InvalidArgument("kv_cache_bytes: " + std::to_string(options.kv_cache_bytes) + " is less than a block (" +
                          std::to_string(block_bytes) + ")");
  }
  const int64_t of_one = ceil_div(settings.max_model_len, settings.block_size);
  return std::max(of_one, std::min(settings.limits.max_num_seqs * of_one, quarter_of_memory() / block_bytes));
}

WeightTypes types_of(const EngineOptions& options, const StoredModel& model) {
  if (options.dtype != "auto") return weight_types(options.dtype, options.attention_dtype, options.head_dtype);
  const std::string plain = model.mostly_fp32() ? "fp32" : "bf16";
  const WeightTypes stored = model.quantized_types().value_or(weight_types(plain));
  const auto wanted = [](const std::string& name, PanelType otherwise) {
    return name.empty() ? std::string(panel_type_name(otherwise)) : name;
  };
  return weight_types(std::string(panel_type_name(stored.experts)), wanted(options.attention_dtype, stored.attention),
                      wanted(options.head_dtype, stored.head));
}

SpeculationKind speculation_kind(const std::string& name) {
  if (name == "off") return SpeculationKind::kOff;
  if (name == "prompt_lookup") return SpeculationKind::kPromptLookup;
  if (name == "draft") return SpeculationKind::kDraft;
  throw InvalidArgument("speculation: '" + name + "' is not one of off, prompt_lookup, draft");
}

SpeculationSettings speculation_settings(const EngineOptions& options) {
  SpeculationSettings settings;
  settings.kind = speculation_kind(options.speculation);
  if ((settings.kind == SpeculationKind::kDraft) == options.draft_model.empty()) {
    throw InvalidArgument(options.draft_model.empty() ? "draft_model: speculation 'draft' needs one"
                                                      : "draft_model: only speculation 'draft' uses one");
  }
  settings.max_tokens = at_least("max_speculated_tokens", options.max_speculated_tokens, 1);
  settings.lookup_min = at_least("prompt_lookup_min", options.prompt_lookup_min, 1);
  settings.lookup_max = at_least("prompt_lookup_max", options.prompt_lookup_max, options.prompt_lookup_min);
  settings.adaptive = options.adaptive_speculation;
  return settings;
}

}  // namespace

LoadFormat load_format(const std::string& name) {
  if (name == "auto") return LoadFormat::kAuto;
  if (name == "dummy") return LoadFormat::kDummy;
  throw InvalidArgument("load_format: '" + name + "' is not one of auto, dummy");
}

EngineSettings engine_settings(const EngineOptions& options, const StoredModel& model) {
  const ModelConfig& config = model.config();
  EngineSettings settings;
  settings.types = types_of(options, model);
  settings.kv_cache_dtype = cache_dtype(options.kv_cache_dtype, settings.types, config);
  at_least("threads", options.threads, 0);
  settings.threads = options.threads > 0 ? options.threads : available_cpus();
  settings.max_model_len = model_len(config, options.max_model_len);
  settings.limits.max_num_batched_tokens = at_least("max_num_batched_tokens", options.max_num_batched_tokens, 1);
  // Each running completion takes a token of a step at least.
  settings.limits.max_num_seqs =
      std::min(at_least("max_num_seqs", options.max_num_seqs, 1), options.max_num_batched_tokens);
  settings.block_size = block_size(options.block_size);
  settings.num_kv_blocks = kv_blocks(options, settings, config);
  settings.enable_prefix_caching = options.enable_prefix_caching;
  settings.speculation = speculation_settings(options);
  return settings;
}

WeightCache engine_weight_cache(const EngineOptions& options, const EngineSettings& settings, const StoredModel& model,
                                const std::string& path) {
  if (options.mmap && !options.weight_cache) {
    throw InvalidArgument("mmap: what is mapped is the file of packed weights, which weight_cache turns off");
  }
  if (!options.weight_cache_dir.empty() && !options.weight_cache) {
    throw InvalidArgument("weight_cache_dir: is for the file of packed weights, which weight_cache turns off");
  }
  if (load_format(options.load_format) == LoadFormat::kDummy) return {};
  const bool small = model.config().num_parameters() < kSmallModel;
  if (!options.mmap && (small || !options.weight_cache)) return {};
  WeightCache cache = weight_cache(path, settings.types.description(), options.weight_cache_dir);
  cache.verified = !options.mmap;
  cache.required = options.mmap || !options.weight_cache_dir.empty() ||
                   packed_bytes(model.config(), model.tensors(), settings.types) > most_in_memory();
  return cache;
}

bool stay_mapped(const EngineOptions& options, const ModelWeights& weights) {
  FileStore* const store = file_of(weights);
  return store && (options.mmap || static_cast<int64_t>(store->file().size()) > most_in_memory());
}

std::unique_ptr<ExpertCache> make_expert_cache(const EngineOptions& options, ModelWeights& weights) {
  at_least("expert_cache_bytes", options.expert_cache_bytes, -1);
  if (!stay_mapped(options, weights) || options.expert_cache_bytes < 0) return nullptr;
  const int64_t bytes = options.expert_cache_bytes > 0 ? options.expert_cache_bytes : quarter_of_memory();
  return std::make_unique<ExpertCache>(weights, static_cast<size_t>(bytes));
}

std::unique_ptr<WeightMover> make_weight_mover(const EngineOptions& options, ModelWeights& weights) {
  if (!file_of(weights)) return nullptr;
  if (!stay_mapped(options, weights)) return std::make_unique<WeightMover>(weights);
  if (!options.mmap) log_info("weights stay in the mapped file: memory does not suffice");
  return nullptr;
}

}  // namespace coterie
