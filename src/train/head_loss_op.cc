#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "kernels/gemm.h"
#include "train/ops.h"
#include "train/torch_pool.h"
#include "train/views.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Tokens per chunk: at a vocabulary of 8192 the chunk's logits take 8 MB, which stay in the L2 and L3
// caches between the product, the softmax and the two gradients.
constexpr int64_t kChunk = 256;

// Chunk by chunk: losses, and the gradients of the mean loss when they are wanted.
class HeadPass {
 public:
  HeadPass(const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& targets, const TeacherSignal* teacher,
           bool with_gradients)
      : hidden_(hidden),
        head_(head),
        targets_(targets),
        teacher_(teacher),
        packed_head_(const_matrix(head), torch_pool()) {
    if (teacher) packed_teacher_ = PackedMatrix(const_matrix(teacher->head_VD), torch_pool());
    if (!with_gradients) return;
    packed_head_transposed_ = PackedMatrix(const_matrix(head).transposed(), torch_pool());
    grad_hidden = at::empty_like(hidden, at::MemoryFormat::Contiguous);
    grad_head = at::empty({head.size(0), head.size(1)}, hidden.options());
  }

  void run() {
    const int64_t num_tokens = hidden_.size(0);
    for (int64_t first = 0; first < num_tokens; first += kChunk) {
      chunk(first, std::min(kChunk, num_tokens - first));
    }
    cross_entropy /= static_cast<double>(num_tokens);
    kl /= static_cast<double>(num_tokens);
  }

  at::Tensor grad_hidden;  // [T, D], undefined without gradients
  at::Tensor grad_head;    // [V, D] fp32
  double cross_entropy = 0;
  double kl = 0;

 private:
  void chunk(int64_t first, int64_t count) {
    const at::Tensor x = hidden_.narrow(0, first, count);
    const at::Tensor logits = product(x, packed_head_);
    const at::Tensor target = targets_.narrow(0, first, count).unsqueeze(1);
    at::Tensor log_probs = at::log_softmax(logits, 1);
    cross_entropy -= log_probs.gather(1, target).sum().item<double>();
    at::Tensor grad;
    if (grad_hidden.defined()) {
      grad = log_probs.exp_();
      grad.scatter_add_(1, target, at::full_like(target, -1.0, grad.options()));
    }
    if (teacher_) add_teacher(first, count, logits, grad);
    if (!grad.defined()) return;
    grad.mul_(1.0 / static_cast<double>(hidden_.size(0)));
    gemm({.a = const_matrix(grad),
          .packed_b = &packed_head_transposed_,
          .c = matrix(grad_hidden.narrow(0, first, count))},
         torch_pool());
    gemm({.a = const_matrix(grad).transposed(),
          .b = const_matrix(x).transposed(),
          .as_bf16 = head_.scalar_type() == at::kBFloat16,
          .c = matrix(grad_head),
          .accumulate = first > 0},
         torch_pool());
  }

  // d/dlogits of alpha tau^2 KL(p || q) with p, q the softmaxes of teacher and student at
  // temperature tau is alpha tau (q - p).
  void add_teacher(int64_t first, int64_t count, const at::Tensor& logits, const at::Tensor& grad) {
    const double tau = teacher_->temperature;
    const at::Tensor teacher_logits = product(teacher_->hidden_TD.narrow(0, first, count), packed_teacher_);
    const at::Tensor log_p = at::log_softmax(tau == 1.0 ? teacher_logits : teacher_logits / tau, 1);
    const at::Tensor log_q = at::log_softmax(tau == 1.0 ? logits : logits / tau, 1);
    const at::Tensor p = log_p.exp();
    kl += (p * (log_p - log_q)).sum().item<double>();
    if (grad.defined()) grad.add_(log_q.exp_().sub_(p), teacher_->alpha * tau);
  }

  static at::Tensor product(const at::Tensor& x, const PackedMatrix& head) {
    const at::Tensor logits = at::empty({x.size(0), head.rows()}, x.options());
    gemm({.a = const_matrix(x), .packed_b = &head, .c = matrix(logits)}, torch_pool());
    return logits;
  }

  const at::Tensor& hidden_;
  const at::Tensor& head_;
  const at::Tensor& targets_;
  const TeacherSignal* teacher_;
  PackedMatrix packed_head_;
  PackedMatrix packed_head_transposed_;
  PackedMatrix packed_teacher_;
};

// Carries the gradients that HeadPass has made to the backward pass.
struct HeadLossOp : torch::autograd::Function<HeadLossOp> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden, const at::Tensor& head,
                            const HeadPass& pass, double loss) {
    context->save_for_backward({pass.grad_hidden, pass.grad_head.to(head.scalar_type())});
    return at::scalar_tensor(loss, hidden.options());
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    return {saved[0] * grads[0], saved[1] * grads[0].to(saved[1].scalar_type()), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

HeadLoss head_loss(const at::Tensor& hidden_TD, const at::Tensor& head_VD, const at::Tensor& targets_T,
                   const TeacherSignal* teacher) {
  const bool with_gradients = c10::GradMode::is_enabled();
  const at::Tensor hidden = hidden_TD.contiguous();
  HeadLoss result;
  HeadPass pass(hidden, head_VD, targets_T, teacher, with_gradients);
  {
    c10::NoGradGuard no_grad;
    pass.run();
  }
  result.cross_entropy = pass.cross_entropy;
  result.kl = pass.kl;
  double loss = pass.cross_entropy;
  if (teacher) loss += teacher->alpha * teacher->temperature * teacher->temperature * pass.kl;
  result.loss =
      with_gradients ? HeadLossOp::apply(hidden, head_VD, pass, loss) : at::scalar_tensor(loss, hidden.options());
  return result;
}

}  // namespace coterie
