// EngineOptions held against the model and the machine.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/dtype.h"
#include "coterie/engine.h"
#include "engine/scheduler.h"
#include "model/config.h"
#include "model/expert_cache.h"
#include "model/stored_model.h"
#include "model/weight_mover.h"
#include "model/weight_store.h"
#include "model/weight_types.h"

namespace coterie {

enum class SpeculationKind { kOff, kPromptLookup, kDraft };

struct SpeculationSettings {
  SpeculationKind kind = SpeculationKind::kOff;
  int64_t max_tokens = 0;
  int64_t lookup_min = 0, lookup_max = 0;
  bool adaptive = true;
};

struct EngineSettings {
  WeightTypes types;
  DType kv_cache_dtype = DType::kF32;
  int threads = 1;
  int64_t max_model_len = 0;
  int64_t block_size = 0;
  int64_t num_kv_blocks = 0;
  bool enable_prefix_caching = true;
  SchedulerLimits limits;
  SpeculationSettings speculation;
};

// InvalidArgument names the option.
LoadFormat load_format(const std::string& name);
EngineSettings engine_settings(const EngineOptions& options, const StoredModel& model);

// Where the packed weights of the model at `path` are kept, if anywhere.
WeightCache engine_weight_cache(const EngineOptions& options, const EngineSettings& settings, const StoredModel& model,
                                const std::string& path);

// Whether weights stay in the mapped file that they came from: where that was asked for, and where they are too many
// for memory.
bool stay_mapped(const EngineOptions& options, const ModelWeights& weights);

// Of weights that stay mapped; null where they don't, or none is wanted.
std::unique_ptr<ExpertCache> make_expert_cache(const EngineOptions& options, ModelWeights& weights);

// Of weights that came from a file and are to leave it; else null.
std::unique_ptr<WeightMover> make_weight_mover(const EngineOptions& options, ModelWeights& weights);

}  // namespace coterie
