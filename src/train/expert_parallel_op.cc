// Experts that are spread over ranks. Legend beside ops.h's: R this rank's routed rows, grouped by expert; A the rows
// that arrive here, of all ranks, grouped by the rank they come from and then by expert; P ranks; L experts of this
// rank; S slices of an expert.
//
// Forward: R rows of x -> exchange -> A rows through L experts -> exchange -> S * R rows -> sum over the slices ->
// weighted sum of each token. Backward mirrors it, with the gradients of the rows. Rank p has the experts from p * L
// on, counted round: so the rows for the ranks of one slice lie one after the other, the ranks of every slice get the
// same ones, and what the ranks of one slice return is R rows in the same order.
//
// An expert's rows lie in the order of the tokens of the whole batch, whatever the ranks that hold them, and a row's
// bits don't depend on the rows beside it: so with whole experts the forward pass gives the bits of one rank, in fp32.
// Rows travel in the weights' type; bf16 rounds what experts, or slices, return.
#include <numeric>

#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "moe/combine.h"
#include "train/expert_layout.h"
#include "train/ops.h"
#include "train/torch_op.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Counts = std::vector<int64_t>;

constexpr const char* kOp = "expert_parallel_experts";

// What a forward pass found out about its rows, and its backward pass needs again.
struct Plan : torch::CustomClassHolder {
  const ExpertRanks* ranks = nullptr;
  std::string activation;
  bool gated = false;
  Dispatch dispatch;           // of this rank's tokens to all experts
  Counts sent_P, arriving_P;   // rows to and from each rank of the group
  at::Tensor arriving_ids_A1;  // the expert of each row that arrives, counted from this rank's first
  int64_t num_arriving() const { return arriving_ids_A1.size(0); }
  int64_t num_returned() const { return ranks->slices * dispatch.num_rows(); }
  std::string label(const char* what) const { return ranks->label + " " + what; }
};

// Bytes and offsets of blocks that lie one after the other, a block for each rank; those of the ranks of one slice, of
// which every slice has the same ones.
struct Blocks {
  Blocks(const Counts& entries_P, int64_t entry_bytes, int64_t slices = 1) {
    const size_t distinct = entries_P.size() / static_cast<size_t>(slices);
    int64_t offset = 0;
    for (size_t p = 0; p < entries_P.size(); ++p) {
      if (p % distinct == 0) offset = 0;
      bytes.push_back(entries_P[p] * entry_bytes);
      offsets.push_back(offset);
      offset += bytes.back();
    }
  }
  Counts bytes, offsets;
};

void exchange(const Plan& plan, const void* input, const Blocks& sent, void* output, const Blocks& received,
              const char* what) {
  plan.ranks->exchange
      ->start({input, sent.bytes, sent.offsets, output, received.bytes, received.offsets}, plan.label(what))
      .wait();
}

// The one small message: every rank tells every other how many rows its experts will get. counts_PL[p, l] is what
// rank p sends to expert l of this rank.
Counts exchange_counts(const Plan& plan, int64_t num_experts) {
  const ExpertRanks& ranks = *plan.ranks;
  const Counts entries_P(static_cast<size_t>(ranks.group->size()), ranks.num_experts);
  Counts sent_E(static_cast<size_t>(num_experts)), counts_PL(entries_P.size() * static_cast<size_t>(ranks.num_experts));
  for (size_t e = 0; e < sent_E.size(); ++e) sent_E[e] = plan.dispatch.offset_E1[e + 1] - plan.dispatch.offset_E1[e];
  exchange(plan, sent_E.data(), {entries_P, sizeof(int64_t), ranks.slices}, counts_PL.data(),
           {entries_P, sizeof(int64_t)}, "counts");
  return counts_PL;
}

c10::intrusive_ptr<Plan> make_plan(const at::Tensor& ids, const at::Tensor& weights, const ExpertRanks& ranks) {
  auto plan = c10::make_intrusive<Plan>();
  const at::Tensor ids_TK = ids.contiguous(), weights_TK = weights.contiguous();
  const int64_t P = ranks.group->size(), L = ranks.num_experts, E = P * L / ranks.slices;
  plan->ranks = &ranks;
  plan->dispatch = make_dispatch(ids_TK.const_data_ptr<int64_t>(), weights_TK.const_data_ptr<float>(), ids_TK.size(0),
                                 ids_TK.size(1), E);
  const std::vector<int64_t>& offset_E1 = plan->dispatch.offset_E1;
  const Counts counts_PL = exchange_counts(*plan, E);
  for (int64_t p = 0; p < P; ++p) {
    const auto from_p = counts_PL.begin() + p * L;
    const int64_t first = p * L % E;
    plan->sent_P.push_back(offset_E1[first + L] - offset_E1[first]);
    plan->arriving_P.push_back(std::accumulate(from_p, from_p + L, int64_t{0}));
  }
  const int64_t A = std::accumulate(plan->arriving_P.begin(), plan->arriving_P.end(), int64_t{0});
  plan->arriving_ids_A1 = at::empty({A, 1}, at::kInt);
  auto* id = plan->arriving_ids_A1.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < P * L; ++i) id = std::fill_n(id, counts_PL[i], static_cast<int32_t>(i % L));
  return plan;
}

// [R, D] on the tokens' side becomes [A, D] on the experts' side.
at::Tensor to_experts(const at::Tensor& rows_RD, const Plan& plan, const char* what) {
  const int64_t D = rows_RD.size(1), row_bytes = D * static_cast<int64_t>(rows_RD.element_size());
  const at::Tensor arriving_AD = pooled_empty({plan.num_arriving(), D}, rows_RD.scalar_type());
  exchange(plan, rows_RD.const_data_ptr(), {plan.sent_P, row_bytes, plan.ranks->slices}, arriving_AD.mutable_data_ptr(),
           {plan.arriving_P, row_bytes}, what);
  return arriving_AD;
}

// And back: what the experts made of the rows, summed over their slices (in fp32 where there are several).
at::Tensor from_experts(const at::Tensor& rows_AD, const Plan& plan, const char* what) {
  const int64_t D = rows_AD.size(1), row_bytes = D * static_cast<int64_t>(rows_AD.element_size());
  const at::Tensor returned = pooled_empty({plan.num_returned(), D}, rows_AD.scalar_type());
  exchange(plan, rows_AD.const_data_ptr(), {plan.arriving_P, row_bytes}, returned.mutable_data_ptr(),
           {plan.sent_P, row_bytes}, what);
  const int64_t S = plan.ranks->slices, R = plan.dispatch.num_rows();
  if (S == 1) return returned;
  const at::Tensor sum_RD = pooled_empty({R, D}, at::kFloat).copy_(returned.narrow(0, 0, R));
  for (int64_t slice = 1; slice < S; ++slice) sum_RD.add_(returned.narrow(0, slice * R, R));
  return sum_RD;
}

// Row r: scale(r) times the row of the token that it carries, in the type in which rows travel.
template <typename Scale>
at::Tensor gather_rows(const at::Tensor& x_TD, const Dispatch& dispatch, at::ScalarType type, const Scale& scale) {
  const int64_t R = dispatch.num_rows(), D = x_TD.size(1);
  const at::Tensor rows_RD = pooled_empty({R, D}, type);
  const ConstMatrix from = const_matrix(x_TD);
  const Matrix to = matrix(rows_RD);
  parallel_rows(R, D, torch_pool(), [&](int64_t r) {
    active_kernels().scale_row(from.row_range(dispatch.token_R[r], 1).data, from.dtype, scale(r),
                               to.row_range(r, 1).data, to.dtype, D);
  });
  return rows_RD;
}

at::Tensor sum_of_rows(const Dispatch& dispatch, const at::Tensor& rows_RD, bool unweighted, at::ScalarType type) {
  const at::Tensor out_TD = pooled_empty({dispatch.num_tokens, rows_RD.size(1)}, type);
  combine(dispatch, rows_RD.to(at::kFloat).const_data_ptr<float>(), unweighted, matrix(out_TD), torch_pool());
  return out_TD;
}

// The gradient of each choice's weight: the output's gradient times what the expert returned.
at::Tensor weight_gradients(const at::Tensor& grad_TD, const at::Tensor& returned_RD, const Dispatch& dispatch,
                            at::IntArrayRef shape_TK) {
  const at::Tensor grad_TK = at::zeros(shape_TK, at::kFloat);
  auto* const grads = grad_TK.mutable_data_ptr<float>();
  const ConstMatrix returned = const_matrix(returned_RD);
  const int64_t D = grad_TD.size(1);
  const auto* const grad = grad_TD.const_data_ptr<float>();
  parallel_rows(dispatch.num_rows(), D, torch_pool(), [&](int64_t r) {
    grads[dispatch.choice_R[r]] =
        active_kernels().dot_row(returned.row_range(r, 1).data, returned.dtype, grad + dispatch.token_R[r] * D, D);
  });
  return grad_TK;
}

// The experts of this rank on rows of which each has one expert and no weight: the ops of experts_op.cc.
std::tuple<at::Tensor, at::Tensor, at::Tensor> local_forward(const at::Tensor& rows_AD, const Plan& plan,
                                                             const ExpertTensors& t) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&,
      const at::Tensor&, const OptionalTensor&, std::string_view, bool);
  static const auto op = find_op<Signature>("coterie::experts_forward");
  return op.call(rows_AD, plan.arriving_ids_A1, std::nullopt, t.up_EUD, if_defined(t.up_bias_EU), t.down_EDF,
                 if_defined(t.down_bias_ED), plan.activation, plan.gated);
}

// Gradients of the rows, nothing, up, up_bias, down, down_bias.
using LocalGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LocalGradients local_backward(const at::Tensor& grad_AD, const at::Tensor& rows_AD, const Plan& plan,
                              const ExpertTensors& t, const at::Tensor& pre_AU, const at::Tensor& inner_AF,
                              std::array<bool, 6> wanted) {
  using Signature = LocalGradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                   const at::Tensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&,
                                   const at::Tensor&, const at::Tensor&, std::string_view, bool, std::array<bool, 6>);
  static const auto op = find_op<Signature>("coterie::experts_backward");
  return op.call(grad_AD, rows_AD, plan.arriving_ids_A1, std::nullopt, t.up_EUD, if_defined(t.up_bias_EU), t.down_EDF,
                 if_defined(t.down_bias_ED), pre_AU, inner_AF, plan.activation, plan.gated, wanted);
}

// A slice's own stretch of the bias among zeros: the sum over the slices has each entry once.
at::Tensor down_bias_of_slice(const at::Tensor& bias_L, const ExpertRanks& ranks) {
  if (!bias_L.defined() || ranks.slices == 1) return bias_L;
  const int64_t n = bias_L.size(1);
  return at::constant_pad_nd(bias_L, {ranks.slice * n, (ranks.slices - 1 - ranks.slice) * n});
}

struct ExpertParallelFunction : torch::autograd::Function<ExpertParallelFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& ids,
                            const at::Tensor& weights, const at::Tensor& up, const OptionalTensor& up_bias,
                            const at::Tensor& down, const OptionalTensor& down_bias, const std::string& activation,
                            bool gated, const ExpertRanks* ranks) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor none, x_TD = x.contiguous();
    const ExpertTensors tensors{up, up_bias.value_or(none), down, down_bias.value_or(none)};
    const auto plan = make_plan(ids, weights, *ranks);
    plan->activation = activation;
    plan->gated = gated;
    const at::Tensor rows_RD = gather_rows(x_TD, plan->dispatch, up.scalar_type(), [](int64_t) { return 1.0f; });
    const at::Tensor rows_AD = to_experts(rows_RD, *plan, "dispatch");
    auto [out_AD, pre_AU, inner_AF] = local_forward(rows_AD, *plan, tensors);
    const at::Tensor returned_RD = from_experts(out_AD, *plan, "combine");
    context->save_for_backward(
        {x, weights, up, tensors.up_bias_EU, down, tensors.down_bias_ED, rows_AD, pre_AU, inner_AF, returned_RD});
    context->saved_data["plan"] = c10::IValue::make_capsule(plan);
    return sum_of_rows(plan->dispatch, returned_RD, /*unweighted=*/false, x.scalar_type());
  }

  // What is exchanged doesn't depend on which gradients are wanted.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const auto capsule = context->saved_data["plan"].toCapsule();
    const Plan& plan = static_cast<const Plan&>(*capsule);
    const variable_list s = context->get_saved_variables();
    const std::vector<bool> w = wanted_gradients(*context, {s[0], plan.arriving_ids_A1, s[1], s[2], s[3], s[4], s[5]});
    const at::Tensor grad_TD = grads[0].to(at::kFloat).contiguous();
    const std::vector<float>& weight_R = plan.dispatch.weight_R;
    const at::Tensor grad_RD =
        gather_rows(grad_TD, plan.dispatch, s[2].scalar_type(), [&](int64_t r) { return weight_R[r]; });
    const at::Tensor grad_AD = to_experts(grad_RD, plan, "backward dispatch");
    auto [grad_rows_AD, unused, grad_up, grad_up_bias, grad_down, grad_down_bias] = local_backward(
        grad_AD, s[6], plan, {s[2], s[3], s[4], s[5]}, s[7], s[8], {true, false, w[3], w[4], w[5], w[6]});
    const at::Tensor grad_rows_RD = from_experts(grad_rows_AD, plan, "backward combine");
    const at::Tensor grad_x = sum_of_rows(plan.dispatch, grad_rows_RD, /*unweighted=*/true, s[0].scalar_type());
    const at::Tensor grad_weights = weight_gradients(grad_TD, s[9], plan.dispatch, s[1].sizes());
    variable_list gradients =
        wanted_only({grad_x, at::Tensor(), grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias}, w);
    gradients.resize(10);  // activation, gated and ranks have none
    return gradients;
  }
};

}  // namespace

at::Tensor experts_of_ranks(const at::Tensor& x_TD, const at::Tensor& expert_ids_TK, const at::Tensor& weights_TK,
                            const ExpertTensors& t, Activation activation, bool gated, const ExpertRanks& ranks) {
  return ExpertParallelFunction::apply(x_TD, expert_ids_TK, weights_TK, t.up_EUD, if_defined(t.up_bias_EU), t.down_EDF,
                                       if_defined(down_bias_of_slice(t.down_bias_ED, ranks)),
                                       std::string(activation_name(activation)), gated, &ranks);
}

}  // namespace coterie
