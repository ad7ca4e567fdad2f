#include "engine/step_cost.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>

#include "model/tensors.h"

namespace coterie {
namespace {

constexpr int64_t kMeasuredTokens = 8;
constexpr int kMeasurements = 3;  // the fastest counts

double bytes_per_element(PanelType type) {
  if (!is_quantized(type)) return type == PanelType::kF32 ? 4 : 2;
  const QuantizedFormat format = quantized_format(type);
  return format.bits / 8.0 + 2.0 / static_cast<double>(format.group);
}

// Of a tensor that every step reads whole.
double dense_bytes(const TensorSpec& tensor, const ModelConfig& config, const WeightTypes& types) {
  const auto has = [&](const char* part) { return tensor.name.find(part) != std::string::npos; };
  const auto elements = static_cast<double>(tensor.num_elements());
  if (has(".experts.") || has("embed_positions")) return 0;
  if (has("embed_tokens")) return config.tie_word_embeddings ? elements * bytes_per_element(types.head) : 0;
  if (has("lm_head.weight")) return elements * bytes_per_element(types.head);
  if (has("_proj.weight")) return elements * bytes_per_element(types.attention);
  if (has(".mlp.")) return elements * bytes_per_element(types.experts);
  return elements * 4;
}

double seconds_of_step(Decoder& decoder, const ModelConfig& config, const BlockTable& blocks, int64_t T) {
  std::vector<int32_t> ids;  // far from each other, so that they go to different experts
  for (int64_t t = 0; t < T; ++t) ids.push_back(static_cast<int32_t>((2 * t + 1) * config.vocab_size / (2 * T)));
  std::vector<float> logits_TV(T * config.vocab_size);
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kMeasurements; ++i) {
    const auto start = std::chrono::steady_clock::now();
    Batch batch;
    batch.add(ids, 0, blocks.layers());
    decoder.logits(decoder.forward(batch), T, logits_TV.data());
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

}  // namespace

WeightTypes types_in_memory(const WeightTypes& wanted, const ModelWeights& weights) {
  WeightTypes types = wanted;
  for (const LayerWeights& layer : weights.layers) {
    if (!layer.experts.up_E.empty()) types.experts = layer.experts.up_E.front().type();
  }
  return types;
}

StepCost::StepCost(const ModelConfig& config, const WeightTypes& types) {
  for (const TensorSpec& tensor : logical_tensors(config)) dense_bytes_ += dense_bytes(tensor, config, types);
  for (const LayerConfig& layer : config.layers) {
    if (!layer.is_moe()) continue;
    const int64_t E = layer.router.num_experts, K = layer.router.top_k;
    const int64_t elements = (config.gated_mlp ? 3 : 2) * config.hidden_size * layer.expert_intermediate_size;
    const double bytes = static_cast<double>(elements) * bytes_per_element(types.experts);
    const auto same = std::ranges::find_if(experts_, [&](auto& e) { return e.num_experts == E && e.top_k == K; });
    if (same == experts_.end()) {
      experts_.push_back({E, K, bytes});
    } else {
      same->bytes_each += bytes;
    }
  }
}

double StepCost::bytes(int64_t num_tokens) const {
  double sum = dense_bytes_;
  for (const auto& [num_experts, top_k, bytes_each] : experts_) {
    const double share = static_cast<double>(top_k) / static_cast<double>(num_experts);
    const double needed = 1 - std::pow(1 - share, static_cast<double>(num_tokens));
    sum += bytes_each * static_cast<double>(num_experts) * needed;
  }
  return sum;
}

double StepCost::seconds(int64_t num_tokens) const {
  return bytes(num_tokens) * seconds_per_byte_ + static_cast<double>(num_tokens) * seconds_per_token_;
}

// Two equations for two factors; neither can be negative.
void StepCost::fit(double seconds_of_1, int64_t n, double seconds_of_n) {
  const double bytes_of_1 = bytes(1), N = static_cast<double>(n);
  const double per_byte = (N * seconds_of_1 - seconds_of_n) / (N * bytes_of_1 - bytes(n));
  seconds_per_byte_ = std::clamp(per_byte, 0.0, seconds_of_1 / bytes_of_1);
  seconds_per_token_ = seconds_of_1 - seconds_per_byte_ * bytes_of_1;
}

StepCost measure_step_cost(const ModelConfig& config, const WeightTypes& types, Decoder& decoder, KvCache& cache) {
  StepCost cost(config, types);
  const int64_t n = std::min(kMeasuredTokens, config.max_context());
  if (n == 1) return cost;
  BlockTable blocks(cache);
  blocks.reserve(n);
  cost.fit(seconds_of_step(decoder, config, blocks, 1), n, seconds_of_step(decoder, config, blocks, n));
  return cost;
}

}  // namespace coterie
