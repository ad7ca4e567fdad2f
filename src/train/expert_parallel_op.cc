// Experts that are spread over ranks. Legend as in ops.h and expert_exchange.h.
//
// Forward: R rows of x -> to the experts -> A rows through L experts -> back -> weighted sum of each token. Backward
// mirrors it, with the gradients of the rows. Part by part: the rows of every part are on their way before the experts
// begin with the first, and what these return travels while they go on with the next.
//
// Within a part an expert's rows lie in the order of the tokens of the whole batch, whatever the ranks that hold them,
// and a row's bits don't depend on the rows beside it: so with whole experts the forward pass gives the bits of one
// rank, in fp32. Rows travel in the weights' type; bf16 rounds what experts, or slices, return.
#include "kernels/kernel_table.h"
#include "kernels/parallel_rows.h"
#include "moe/combine.h"
#include "train/expert_exchange.h"
#include "train/ops.h"
#include "train/torch_op.h"

namespace coterie {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kOp = "expert_parallel_experts";

at::Tensor tokens_of(const at::Tensor& tensor_Tx, const TokenPart& part) {
  return tensor_Tx.narrow(0, part.first_token, part.dispatch.num_tokens);
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

// Into the part's tokens of out_TD.
void sum_rows(const TokenPart& part, const at::Tensor& rows_RD, bool unweighted, const at::Tensor& out_TD) {
  combine(part.dispatch, rows_RD.to(at::kFloat).const_data_ptr<float>(), unweighted, matrix(tokens_of(out_TD, part)),
          torch_pool());
}

// The gradient of each choice's weight, into the part's tokens of grad_TK, which are zeros: the output's gradient times
// what the expert returned.
void weight_gradients(const TokenPart& part, const at::Tensor& grad_TD, const at::Tensor& returned_RD,
                      const at::Tensor& grad_TK) {
  const Dispatch& dispatch = part.dispatch;
  const ConstMatrix grad = const_matrix(tokens_of(grad_TD, part)), returned = const_matrix(returned_RD);
  auto* const grads = tokens_of(grad_TK, part).mutable_data_ptr<float>();
  parallel_rows(dispatch.num_rows(), grad.cols, torch_pool(), [&](int64_t r) {
    const auto* const grad_D = static_cast<const float*>(grad.row_range(dispatch.token_R[r], 1).data);
    grads[dispatch.choice_R[r]] =
        active_kernels().dot_row(returned.row_range(r, 1).data, returned.dtype, grad_D, grad.cols);
  });
}

// The experts of this rank.
struct LocalExperts {
  ExpertTensors tensors;
  std::string activation;
  bool gated = false;
};

// On rows of which each has one expert and no weight: the ops of experts_op.cc. What the experts return, and what the
// backward pass needs.
using LocalResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
LocalResult local_forward(const at::Tensor& rows_AD, const at::Tensor& ids_A1, const LocalExperts& experts) {
  using Signature =
      LocalResult(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&,
                  const at::Tensor&, const OptionalTensor&, std::string_view, bool);
  static const auto op = find_op<Signature>("coterie::experts_forward");
  const ExpertTensors& t = experts.tensors;
  return op.call(rows_AD, ids_A1, std::nullopt, t.up_EUD, if_defined(t.up_bias_EU), t.down_EDF,
                 if_defined(t.down_bias_ED), experts.activation, experts.gated);
}

// Gradients of the rows, nothing, up, up_bias, down, down_bias.
using LocalGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LocalGradients local_backward(const at::Tensor& grad_AD, const at::Tensor& rows_AD, const at::Tensor& ids_A1,
                              const LocalExperts& experts, const at::Tensor& slopes_AU, const at::Tensor& inner_AF,
                              std::array<bool, 6> wanted) {
  using Signature = LocalGradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                   const at::Tensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&,
                                   const at::Tensor&, const at::Tensor&, std::string_view, bool, std::array<bool, 6>);
  static const auto op = find_op<Signature>("coterie::experts_backward");
  const ExpertTensors& t = experts.tensors;
  return op.call(grad_AD, rows_AD, ids_A1, std::nullopt, t.up_EUD, if_defined(t.up_bias_EU), t.down_EDF,
                 if_defined(t.down_bias_ED), slopes_AU, inner_AF, experts.activation, experts.gated, wanted);
}

void add_to(at::Tensor& sum, const at::Tensor& term) {
  if (sum.defined()) {
    sum.add_(term);
  } else {
    sum = term;
  }
}

// A slice's own stretch of the bias among zeros: the sum over the slices has each entry once.
at::Tensor down_bias_of_slice(const at::Tensor& bias_L, const ExpertRanks& ranks) {
  if (!bias_L.defined() || ranks.slices == 1) return bias_L;
  const int64_t n = bias_L.size(1);
  return at::constant_pad_nd(bias_L, {ranks.slice * n, (ranks.slices - 1 - ranks.slice) * n});
}

struct ExpertParallelFunction : torch::autograd::Function<ExpertParallelFunction> {
  // What is kept for the backward pass: of all parts together, and then of each.
  enum Shared { kX, kWeights, kUp, kUpBias, kDown, kDownBias, kNumShared };
  enum OfPart { kRows, kSlopes, kInner, kReturned, kNumOfPart };
  static size_t place(size_t part, OfPart what) { return kNumShared + part * kNumOfPart + what; }

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& ids,
                            const at::Tensor& weights, const at::Tensor& up, const OptionalTensor& up_bias,
                            const at::Tensor& down, const OptionalTensor& down_bias, const std::string& activation,
                            bool gated, const ExpertRanks* ranks) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor none, x_TD = x.contiguous();
    const LocalExperts experts{{up, up_bias.value_or(none), down, down_bias.value_or(none)}, activation, gated};
    const auto exchange = c10::make_intrusive<ExpertExchange>(ids, weights, *ranks);
    const std::vector<TokenPart>& parts = exchange->parts();
    const PollBetweenTasks poll([&] { exchange->progress(); });
    std::vector<RowsUnderWay> there, back;
    for (const TokenPart& part : parts) {
      const auto unweighted = [](int64_t /*row*/) { return 1.0f; };
      const at::Tensor rows_RD = gather_rows(tokens_of(x_TD, part), part.dispatch, up.scalar_type(), unweighted);
      there.push_back(exchange->start_to_experts(part, rows_RD, "dispatch"));
    }
    variable_list kept{x, weights, up, experts.tensors.up_bias_EU, down, experts.tensors.down_bias_ED};
    kept.resize(place(parts.size(), kRows));
    for (size_t n = 0; n < parts.size(); ++n) {
      const at::Tensor rows_AD = kept[place(n, kRows)] = there[n].wait();
      auto [out_AD, slopes_AU, inner_AF] = local_forward(rows_AD, parts[n].arriving_ids_A1, experts);
      back.push_back(exchange->start_from_experts(parts[n], out_AD, "combine"));
      kept[place(n, kSlopes)] = slopes_AU;
      kept[place(n, kInner)] = inner_AF;
    }
    const at::Tensor out_TD = pooled_empty(x.sizes(), x.scalar_type());
    for (size_t n = 0; n < parts.size(); ++n) {
      const at::Tensor returned_RD = kept[place(n, kReturned)] = back[n].wait();
      sum_rows(parts[n], returned_RD, /*unweighted=*/false, out_TD);
    }
    context->save_for_backward(std::move(kept));
    context->saved_data["exchange"] = c10::IValue::make_capsule(exchange);
    context->saved_data["activation"] = activation;
    context->saved_data["gated"] = gated;
    return out_TD;
  }

  // What is exchanged doesn't depend on which gradients are wanted.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative(kOp);
    const auto capsule = context->saved_data["exchange"].toCapsule();
    const auto& exchange = static_cast<const ExpertExchange&>(*capsule);
    const std::vector<TokenPart>& parts = exchange.parts();
    const PollBetweenTasks poll([&] { exchange.progress(); });
    const variable_list s = context->get_saved_variables();
    const LocalExperts experts{{s[kUp], s[kUpBias], s[kDown], s[kDownBias]},
                               context->saved_data["activation"].toStringRef(),
                               context->saved_data["gated"].toBool()};
    const at::Tensor& ids = parts[0].arriving_ids_A1;  // stands for the choices, which have no gradient
    const std::vector<bool> w =
        wanted_gradients(*context, {s[kX], ids, s[kWeights], s[kUp], s[kUpBias], s[kDown], s[kDownBias]});
    const at::Tensor grad_TD = grads[0].to(at::kFloat).contiguous();
    std::vector<RowsUnderWay> there, back;
    for (const TokenPart& part : parts) {
      const auto weight = [&](int64_t row) { return part.dispatch.weight_R[static_cast<size_t>(row)]; };
      const at::Tensor rows_RD = gather_rows(tokens_of(grad_TD, part), part.dispatch, s[kUp].scalar_type(), weight);
      there.push_back(exchange.start_to_experts(part, rows_RD, "backward dispatch"));
    }
    at::Tensor grad_up, grad_up_bias, grad_down, grad_down_bias;
    for (size_t n = 0; n < parts.size(); ++n) {
      auto [rows_AD, unused, up, up_bias, down, down_bias] =
          local_backward(there[n].wait(), s[place(n, kRows)], parts[n].arriving_ids_A1, experts, s[place(n, kSlopes)],
                         s[place(n, kInner)], {true, false, w[3], w[4], w[5], w[6]});
      back.push_back(exchange.start_from_experts(parts[n], rows_AD, "backward combine"));
      add_to(grad_up, up);
      add_to(grad_up_bias, up_bias);
      add_to(grad_down, down);
      add_to(grad_down_bias, down_bias);
    }
    const at::Tensor grad_x = pooled_empty(s[kX].sizes(), s[kX].scalar_type());
    const at::Tensor grad_weights = at::zeros(s[kWeights].sizes(), at::kFloat);
    for (size_t n = 0; n < parts.size(); ++n) {
      weight_gradients(parts[n], grad_TD, s[place(n, kReturned)], grad_weights);
      sum_rows(parts[n], back[n].wait(), /*unweighted=*/true, grad_x);
    }
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
