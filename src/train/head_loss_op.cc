#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "kernels/gemm.h"
#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "train/ops.h"
#include "train/torch_op.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Wanted = std::array<bool, 2>;                           // gradients of hidden and weight
using Loss = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // loss (fp32), cross entropy, KL (fp64)
using LossAndGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
constexpr const char* kOp = "coterie::head_cross_entropy";

// Tokens of a chunk. The head's gradient is read and written once in each, so chunks are long: as long as their
// logits are this many, which about stay in a cache between the product, the softmax and the two gradients.
constexpr int64_t kChunkLogits = 8 << 20, kLeastChunk = 256, kMostChunk = 1024;

int64_t chunk_tokens(int64_t num_words) {
  return std::clamp(kChunkLogits / std::max<int64_t>(num_words, 1), kLeastChunk, kMostChunk);
}

void check_head(const at::Tensor& hidden, const char* hidden_name, const at::Tensor& weight, const char* weight_name) {
  check_floating(hidden, kOp, hidden_name);
  check_floating(weight, kOp, weight_name);
  check_axes(hidden, 2, kOp, hidden_name);
  check_axes(weight, 2, kOp, weight_name);
  check_size(hidden, 1, weight.sym_size(1), kOp, hidden_name);
}

void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
           const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_weight, double temperature) {
  check_head(hidden, "hidden", weight, "weight");
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, kOp, ": targets is ", targets.scalar_type(), ", not Long");
  check_axes(targets, 1, kOp, "targets");
  check_size(targets, 0, hidden.sym_size(0), kOp, "targets");
  TORCH_CHECK_VALUE(given(teacher_hidden) == given(teacher_weight), kOp,
                    ": teacher_hidden and teacher_weight come together");
  if (!given(teacher_hidden)) return;
  check_head(*teacher_hidden, "teacher_hidden", *teacher_weight, "teacher_weight");
  check_size(*teacher_hidden, 0, hidden.sym_size(0), kOp, "teacher_hidden");
  check_size(*teacher_weight, 0, weight.sym_size(0), kOp, "teacher_weight");
  TORCH_CHECK_VALUE(temperature > 0, kOp, ": temperature (", temperature, ") is not above 0");
}

// Chunk by chunk: losses, and the gradients of the mean loss when they are wanted.
class HeadPass {
 public:
  HeadPass(const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& targets, int64_t ignore_index,
           const TeacherSignal* teacher, Wanted wanted)
      : hidden_(hidden),
        targets_(targets.contiguous()),
        ignore_index_(ignore_index),
        teacher_(teacher),
        wanted_(wanted),
        packed_head_(const_matrix(head), torch_pool()) {
    if (teacher) packed_teacher_ = PackedMatrix(const_matrix(teacher->head_VD), torch_pool());
    if (wanted[0]) packed_head_transposed_ = PackedMatrix(const_matrix(head).transposed(), torch_pool());
    grad_hidden = gradient_of(hidden, wanted[0]);
    grad_head = wanted[1] ? pooled_empty(head.sizes(), at::kFloat) : at::empty({0}, at::kFloat);
    num_scored_ = targets.ne(ignore_index).sum().item<int64_t>();
    check_targets(head.size(0));
  }

  void run() {
    const int64_t num_tokens = hidden_.size(0), most = chunk_tokens(packed_head_.rows());
    if (num_tokens == 0) grad_head.zero_();
    for (int64_t first = 0; first < num_tokens; first += most) {
      chunk(first, std::min(most, num_tokens - first));
    }
    cross_entropy /= static_cast<double>(num_scored_);
    kl /= static_cast<double>(num_scored_);
  }

  at::Tensor grad_hidden;  // [T, D], [0] when not wanted
  at::Tensor grad_head;    // [V, D] fp32, [0] when not wanted
  double cross_entropy = 0;
  double kl = 0;

 private:
  void chunk(int64_t first, int64_t count) {
    const at::Tensor x = hidden_.narrow(0, first, count);
    const at::Tensor logits = product(x, packed_head_);
    const at::Tensor grad = softmax(first, logits);
    if (teacher_) add_teacher(first, count, logits, grad);
    if (wanted_[0]) {
      gemm({.a = const_matrix(grad),
            .packed_b = &packed_head_transposed_,
            .c = matrix(grad_hidden.narrow(0, first, count))},
           torch_pool());
    }
    if (!wanted_[1]) return;
    gemm({.a = const_matrix(grad).transposed(),
          .b = const_matrix(x).transposed(),
          .panels = packed_head_.dtype(),
          .c = matrix(grad_head),
          .accumulate = first > 0},
         torch_pool());
  }

  // Adds to the cross entropy, and gives its gradient: (softmax - 1 at the target) / number of scored tokens, in the
  // type that the products round it to, or fp32 where the teacher's part is still to come.
  at::Tensor softmax(int64_t first, const at::Tensor& logits) {
    const int64_t count = logits.size(0), V = logits.size(1);
    const bool fp32 = teacher_ || packed_head_.dtype() == DType::kF32;
    const at::Tensor grad = pooled_empty({count, V}, fp32 ? at::kFloat : at::kBFloat16);
    const Matrix grad_rows = matrix(grad);
    const auto* const targets = targets_.const_data_ptr<int64_t>() + first;
    const auto* const logits_V = logits.const_data_ptr<float>();
    std::vector<double> losses(static_cast<size_t>(count), 0.0);
    parallel_rows(count, 4 * V, torch_pool(), [&](int64_t t) {
      void* const row = grad_rows.row_range(t, 1).data;
      const float share = targets[t] == ignore_index_ ? 0.0f : 1.0f / static_cast<float>(num_scored_);
      losses[static_cast<size_t>(t)] = softmax_row(logits_V + t * V, V, targets[t], share, row, grad_rows.dtype);
    });
    cross_entropy += std::accumulate(losses.begin(), losses.end(), 0.0);
    return grad;
  }

  // A token's loss; grad = share * (softmax - 1 at the target), 0 where it is ignored.
  double softmax_row(const float* logits, int64_t V, int64_t target, float share, void* grad, DType dtype) const {
    const KernelTable& kernels = active_kernels();
    static thread_local std::vector<float> exponentials;
    exponentials.resize(static_cast<size_t>(V));
    const SoftmaxSum softmax = kernels.exponentials_row(logits, V, 1.0f, exponentials.data(), DType::kF32);
    const bool scored = target != ignore_index_;
    const float scale = share / softmax.sum;
    kernels.scale_row(exponentials.data(), DType::kF32, scale, grad, dtype, V);
    if (!scored) return 0.0;
    const float at_target = exponentials[static_cast<size_t>(target)] * scale - share;
    kernels.convert_row(&at_target, DType::kF32, static_cast<char*>(grad) + target * dtype_size(dtype), dtype, 1);
    return std::log(double{softmax.sum}) + softmax.maximum - logits[target];
  }

  void check_targets(int64_t num_words) const {
    const auto* const targets = targets_.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < targets_.size(0); ++t) {
      TORCH_CHECK_INDEX(targets[t] == ignore_index_ || (targets[t] >= 0 && targets[t] < num_words), kOp,
                        ": targets has ", targets[t], ", outside of a vocabulary of ", num_words);
    }
  }

  // d/dlogits of alpha tau^2 KL(p || q) with p, q the softmaxes of teacher and student at
  // temperature tau is alpha tau (q - p).
  void add_teacher(int64_t first, int64_t count, const at::Tensor& logits, const at::Tensor& grad) {
    const double tau = teacher_->temperature;
    const at::Tensor scored = targets_.narrow(0, first, count).ne(ignore_index_).to(at::kFloat).unsqueeze(1);
    const at::Tensor teacher_logits = product(teacher_->hidden_TD.narrow(0, first, count), packed_teacher_);
    const at::Tensor log_p = at::log_softmax(tau == 1.0 ? teacher_logits : teacher_logits / tau, 1);
    const at::Tensor log_q = at::log_softmax(tau == 1.0 ? logits : logits / tau, 1);
    const at::Tensor p = log_p.exp();
    kl += (p * (log_p - log_q)).sum(1, true).mul_(scored).sum().item<double>();
    const double share = teacher_->alpha * tau / static_cast<double>(num_scored_);
    grad.add_(log_q.exp_().sub_(p).mul_(scored), share);
  }

  static at::Tensor product(const at::Tensor& x, const PackedMatrix& head) {
    const at::Tensor logits = pooled_empty({x.size(0), head.rows()}, at::kFloat);
    gemm({.a = const_matrix(x), .packed_b = &head, .c = matrix(logits)}, torch_pool());
    return logits;
  }

  const at::Tensor& hidden_;
  const at::Tensor targets_;
  const int64_t ignore_index_;
  int64_t num_scored_ = 0;
  const TeacherSignal* teacher_;
  const Wanted wanted_;
  PackedMatrix packed_head_;
  PackedMatrix packed_head_transposed_;
  PackedMatrix packed_teacher_;
};

LossAndGradients forward_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                             const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_weight, double alpha,
                             double temperature, int64_t ignore_index, Wanted wanted) {
  check(hidden, weight, targets, teacher_hidden, teacher_weight, temperature);
  std::optional<TeacherSignal> teacher;
  if (given(teacher_hidden)) teacher = TeacherSignal{*teacher_hidden, *teacher_weight, alpha, temperature};
  HeadPass pass(hidden, weight, targets, ignore_index, teacher ? &*teacher : nullptr, wanted);
  pass.run();
  double loss = pass.cross_entropy;
  if (teacher) loss += alpha * temperature * temperature * pass.kl;
  const auto metric = [](double value) { return at::scalar_tensor(value, at::kDouble); };
  return {at::scalar_tensor(loss, at::kFloat), metric(pass.cross_entropy), metric(pass.kl), pass.grad_hidden,
          pass.grad_head.to(weight.scalar_type())};
}

LossAndGradients forward_meta(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                              const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_weight,
                              double /*alpha*/, double temperature, int64_t /*ignore_index*/, Wanted wanted) {
  check(hidden, weight, targets, teacher_hidden, teacher_weight, temperature);
  const auto scalar = [&](at::ScalarType type) { return at::empty({}, hidden.options().dtype(type)); };
  return {scalar(at::kFloat), scalar(at::kDouble), scalar(at::kDouble), meta_gradient_of(hidden, wanted[0], hidden),
          meta_gradient_of(weight, wanted[1], weight)};
}

const auto& forward_op() {
  static const auto op = find_op<decltype(forward_cpu)>("coterie::head_cross_entropy_forward");
  return op;
}

Loss without_gradients(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                       const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_weight, double alpha,
                       double temperature, int64_t ignore_index) {
  const auto [loss, cross_entropy, kl, grad_hidden, grad_weight] = forward_op().call(
      hidden, weight, targets, teacher_hidden, teacher_weight, alpha, temperature, ignore_index, {false, false});
  return {loss, cross_entropy, kl};
}

// The gradients are made on the way forward, while a chunk's logits lie in the cache; backward scales them.
struct HeadFunction : torch::autograd::Function<HeadFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight,
                               const at::Tensor& targets, const OptionalTensor& teacher_hidden,
                               const OptionalTensor& teacher_weight, double alpha, double temperature,
                               int64_t ignore_index) {
    const Wanted wanted{hidden.requires_grad(), weight.requires_grad()};
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, cross_entropy, kl, grad_hidden, grad_weight] = forward_op().call(
        hidden, weight, targets, teacher_hidden, teacher_weight, alpha, temperature, ignore_index, wanted);
    context->save_for_backward({grad_hidden, grad_weight});
    context->saved_data["hidden"] = wanted[0];
    context->saved_data["weight"] = wanted[1];
    context->mark_non_differentiable({cross_entropy, kl});
    return {loss, cross_entropy, kl};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const variable_list saved = context->get_saved_variables();
    variable_list gradients(8);
    if (context->saved_data["hidden"].toBool()) gradients[0] = saved[0] * grads[0];  // of its type
    if (context->saved_data["weight"].toBool()) gradients[1] = saved[1] * grads[0];
    return gradients;
  }
};

Loss with_autograd(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                   const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_weight, double alpha,
                   double temperature, int64_t ignore_index) {
  TORCH_CHECK_VALUE(!wants_graph({teacher_hidden, teacher_weight}), kOp,
                    ": teacher_hidden and teacher_weight have no gradient; detach them");
  if (wants_graph({hidden, weight})) {
    const variable_list out =
        HeadFunction::apply(hidden, weight, targets, teacher_hidden, teacher_weight, alpha, temperature, ignore_index);
    return {out[0], out[1], out[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return without_gradients(hidden, weight, targets, teacher_hidden, teacher_weight, alpha, temperature, ignore_index);
}

const auto& loss_op() {
  static const auto op = find_op<decltype(without_gradients)>("coterie::head_cross_entropy");
  return op;
}

Loss with_autocast(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                   const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_weight, double alpha,
                   double temperature, int64_t ignore_index) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return loss_op().call(autocast(hidden), autocast(weight), targets, autocast(teacher_hidden), autocast(teacher_weight),
                        alpha, temperature, ignore_index);
}

}  // namespace

HeadLoss head_loss(const at::Tensor& hidden_TD, const at::Tensor& head_VD, const at::Tensor& targets_T,
                   const TeacherSignal* teacher) {
  const auto [loss, cross_entropy, kl] = loss_op().call(
      hidden_TD, head_VD, targets_T, teacher ? OptionalTensor(teacher->hidden_TD.detach()) : std::nullopt,
      teacher ? OptionalTensor(teacher->head_VD.detach()) : std::nullopt, teacher ? teacher->alpha : 1.0,
      teacher ? teacher->temperature : 1.0, kIgnoredTarget);
  return {loss, cross_entropy.item<double>(), kl.item<double>()};
}

TORCH_LIBRARY_FRAGMENT(coterie, m) {
  m.def(
      "head_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? teacher_hidden=None, "
      "Tensor? teacher_weight=None, float alpha=1., float temperature=1., int ignore_index=-100) -> "
      "(Tensor loss, Tensor cross_entropy, Tensor kl)");
  m.def(
      "head_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? teacher_hidden, "
      "Tensor? teacher_weight, float alpha, float temperature, int ignore_index, bool[2] wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("head_cross_entropy", without_gradients);
  m.impl("head_cross_entropy_forward", forward_cpu);
}

TORCH_LIBRARY_IMPL(coterie, Meta, m) {
  m.impl("head_cross_entropy", without_gradients);
  m.impl("head_cross_entropy_forward", forward_meta);
}

TORCH_LIBRARY_IMPL(coterie, Autograd, m) {
  m.impl("head_cross_entropy", with_autograd);
  m.impl("head_cross_entropy_forward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(coterie, AutocastCPU, m) { m.impl("head_cross_entropy", with_autocast); }

}  // namespace coterie
