// A model's weights in memory, packed once for the kernels, in the types that were asked for.
// Legend: V vocabulary, P positions, D hidden, H query heads, G KV heads, d head_dim, E experts.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/gemm.h"
#include "model/checkpoint_map.h"
#include "model/config.h"
#include "model/weight_store.h"
#include "model/weight_types.h"
#include "moe/experts.h"

namespace coterie {

struct NormWeights {
  std::vector<float> weight;
  std::vector<float> bias;  // empty: none
};

struct LinearWeights {
  PackedMatrix weight_NK;
  std::vector<float> bias_N;  // empty: none

  const float* bias() const { return bias_N.empty() ? nullptr : bias_N.data(); }
};

// Of latent attention, see model/latent_attention.h. Legend: R rank of keys and values, Q of queries.
struct LatentWeights {
  LinearWeights q_a;                     // [Q, D], or empty: then LayerWeights::q has the queries
  std::vector<float> q_a_norm;           // [Q]
  LinearWeights q_b;                     // [H d, Q]
  LinearWeights kv_a;                    // [R + rope, D]
  std::vector<float> kv_a_norm;          // [R]
  std::vector<PackedMatrix> key_up_H;    // of each head, transposed: [R, nope]
  std::vector<PackedMatrix> value_up_H;  // of each head: [v, R]
};

struct LayerWeights {
  NormWeights input_norm;
  LinearWeights q, k, v;              // [H d, D], [G d, D], [G d, D]
  std::vector<float> q_norm, k_norm;  // [d], [heads * d], or empty
  LatentWeights latent;
  std::vector<float> sinks_H;      // or empty
  LinearWeights attention_output;  // [D, H v]
  NormWeights post_attention_norm;
  PackedExperts mlp;                 // the dense MLP, or the fixed one beside the experts
  LinearWeights router;              // [E, D]
  std::vector<float> choice_bias_E;  // empty: none
  PackedExperts experts;
  LinearWeights mix;  // [2, D] or [1, D], see ResidualKind
};

struct ModelWeights {
  std::unique_ptr<WeightStore> store;  // holds the matrices
  PackedMatrix embedding_VD;           // empty where it is tied to the head
  std::vector<float> positions_PD;     // learned ones, or empty
  std::vector<LayerWeights> layers;
  NormWeights norm;
  LinearWeights head;  // [V, D]

  const PackedMatrix& embedding() const { return embedding_VD.data() ? embedding_VD : head.weight_NK; }
};

// Calls visit(PackedMatrix&) for every matrix.
void visit_matrices(ModelWeights& weights, const std::function<void(PackedMatrix&)>& visit);

// What the matrices that load_weights() makes of these tensors take, or a little more.
int64_t packed_bytes(const ModelConfig& config, const LogicalReader& reader, const WeightTypes& types);

ModelWeights load_weights(const ModelConfig& config, const LogicalReader& reader, const WeightTypes& types,
                          ThreadPool& pool, const WeightCache& cache = {});

}  // namespace coterie
