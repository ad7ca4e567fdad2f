// The rows of a pass on their way between the ranks that have their tokens and those that have their experts. Legend:
// T tokens of this rank, K choices of each; R its routed rows, grouped by expert; A the rows that arrive here, of all
// ranks, grouped by the rank they come from and then by expert; P ranks; L experts of this rank; S slices of an expert.
//
// R rows go to the experts and become A rows there; what experts make of these comes back as S blocks of R rows, which
// are added up. Rank p has the experts from p * L on, counted round: so the rows for the ranks of one slice lie one
// after the other, the ranks of every slice get the same ones, and what they return is R rows in the same order.
//
// The tokens go through in parts (ExpertRanks::parts), so that the rows of one travel while experts work on those of
// another. R and A are of one part. Which messages run depends on the layout alone: parts without tokens take part.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <vector>

#include "comm/process_group.h"
#include "moe/dispatcher.h"
#include "train/expert_layout.h"

namespace coterie {

// Tokens [first_token, first_token + dispatch.num_tokens) of a rank.
struct TokenPart {
  int64_t first_token = 0;
  Dispatch dispatch;                        // to all experts; tokens and choices are counted from the part's first
  std::vector<int64_t> sent_P, arriving_P;  // rows to and from each rank of the group
  at::Tensor arriving_ids_A1;               // int32, the expert of each row that arrives, of L
};

// Rows that travel, with the memory that they travel from and to.
struct RowsUnderWay {
  at::Tensor wait();  // the rows, once; of several slices the sum, in fp32

  at::Tensor sent, received;
  int64_t slices = 1;  // in `received` one after the other
  Work work;           // ends before its memory does
};

// Collective over ranks.group, as is all that starts; `ranks` outlives it.
class ExpertExchange : public torch::CustomClassHolder {
 public:
  // ids int64 [T, K], weights fp32 [T, K]. One small message tells every rank how many rows it will get.
  ExpertExchange(const at::Tensor& ids, const at::Tensor& weights, const ExpertRanks& ranks);

  const std::vector<TokenPart>& parts() const { return parts_; }
  void progress() const noexcept;  // moves what is under way; what goes wrong wait() will say

  // [R, D] -> [A, D], and [A, D] -> [R, D]; fp32 or bf16. `what` is for messages of errors.
  RowsUnderWay start_to_experts(const TokenPart& part, const at::Tensor& rows_RD, const char* what) const;
  RowsUnderWay start_from_experts(const TokenPart& part, const at::Tensor& rows_AD, const char* what) const;

 private:
  struct Blocks;
  std::vector<int64_t> exchange_counts() const;
  Work start(const void* input, const Blocks& sent, void* output, const Blocks& received, const char* what) const;

  const ExpertRanks& ranks_;
  std::vector<TokenPart> parts_;
};

}  // namespace coterie
