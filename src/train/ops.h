// Differentiable operations over our kernels: what LanguageModel is made of, beside ATen's own.
// LanguageModel's weights are fp32 or bf16 (then the products take bf16 operands and accumulate in fp32, as the engine
// does), its biases, norms and routers fp32. Its activations are fp32, but for those of bf16 models that only products
// read: queries, keys and values, and what attention makes of them, are bf16 as the products would round them. The ops
// that Python sees too (torch.ops.coterie) also take bf16 activations and biases. Legend: T tokens, D hidden, N
// outputs, E experts, K top-k, U rows of an expert's up matrix, F inner size, V vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "kernels/activation.h"
#include "kernels/causal_attention.h"
#include "model/config.h"
#include "moe/router.h"

namespace coterie {

struct ExpertRanks;

// x W_ND^T + b_N of x [..., D], in x's type unless another is given. `bias` may be undefined. Python: coterie::linear.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight_ND, const at::Tensor& bias_N,
                  std::optional<at::ScalarType> dtype = std::nullopt);

// Causal self-attention of whole sequences (kernels/causal_attention.h): qkv [T, (H + 2 G) * d] -> [T, H * d], both
// fp32 or both bf16. With theta > 0, queries and keys are rotated before (rope.h); token t has position t % S.
at::Tensor causal_attention(const at::Tensor& qkv_TC, const CausalShape& shape, double theta);

// The next value of the residual stream, and what the next block reads: sum = x + y, or x where y is undefined, and
// normed = its RMSNorm or LayerNorm. `bias_D` may be undefined. All fp32.
struct NormSettings {
  NormKind kind = NormKind::kRmsNorm;
  float eps = 1e-5f;
};
struct Normalized {
  at::Tensor sum_TD, normed_TD;
};
Normalized add_norm(const at::Tensor& x_TD, const at::Tensor& y_TD, const at::Tensor& weight_D,
                    const at::Tensor& bias_D, const NormSettings& settings);

at::Tensor rms_norm(const at::Tensor& x_TD, const at::Tensor& weight_D, double eps);

struct Routed {
  at::Tensor weights_TK;             // differentiable
  at::Tensor expert_ids_TK;          // int64, -1 for a dropped choice
  std::shared_ptr<Routing> routing;  // the choices, and the same weights; no scores
};
Routed route_tokens(const RouterConfig& config, const at::Tensor& logits_TE, const RouteOptions& options);

// sum over a token's choices of weight * expert(x). An id (int32 or int64) outside [0, E) is a choice of no
// expert. `weights_TK` undefined: weights of 1 without gradient (a dense MLP is one expert that every token
// visits). Python: coterie::experts.
struct ExpertTensors {
  at::Tensor up_EUD;
  at::Tensor up_bias_EU;  // undefined without biases
  at::Tensor down_EDF;
  at::Tensor down_bias_ED;  // undefined without biases
};
at::Tensor experts(const at::Tensor& x_TD, const at::Tensor& expert_ids_TK, const at::Tensor& weights_TK,
                   const ExpertTensors& tensors, Activation activation, bool gated);

// The same for experts that are spread over ranks: `tensors` are those of this rank, `expert_ids_TK` (int64) count over
// all. Collective over ranks.group, forward and backward; ranks without tokens or choices take part like all
// others. `ranks` outlives the backward pass.
at::Tensor experts_of_ranks(const at::Tensor& x_TD, const at::Tensor& expert_ids_TK, const at::Tensor& weights_TK,
                            const ExpertTensors& tensors, Activation activation, bool gated, const ExpertRanks& ranks);

// The output head with its loss, without ever holding all logits: chunks of tokens run forward and,
// when a gradient is wanted, backward at once.
//   loss = CE(student, targets) + alpha * tau^2 * KL(teacher || student) at temperature tau, means over T
// (Hinton et al. 2015; DeepSpeed-MoE section 4). Without a teacher, loss is CE alone. Tokens whose target is
// kIgnoredTarget count in neither. Python: coterie::head_cross_entropy.
inline constexpr int64_t kIgnoredTarget = -100;
struct TeacherSignal {
  at::Tensor hidden_TD;  // the teacher's last hidden states of the same tokens, after its final norm
  at::Tensor head_VD;    // its output matrix
  double alpha = 1.0;
  double temperature = 1.0;
};
struct HeadLoss {
  at::Tensor loss;  // differentiable scalar
  double cross_entropy = 0;
  double kl = 0;  // of temperature tau, not scaled
};
HeadLoss head_loss(const at::Tensor& hidden_TD, const at::Tensor& head_VD, const at::Tensor& targets_T,
                   const TeacherSignal* teacher);

}  // namespace coterie
