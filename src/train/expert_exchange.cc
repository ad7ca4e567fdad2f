#include "train/expert_exchange.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "coterie/error.h"
#include "train/pooled_tensor.h"

namespace coterie {
namespace {

using Counts = std::vector<int64_t>;

int64_t row_bytes(const at::Tensor& rows) { return rows.size(1) * static_cast<int64_t>(rows.element_size()); }

}  // namespace

// Bytes and offsets of blocks that lie one after the other, a block for each rank; those of the ranks of one slice, of
// which every slice has the same ones.
struct ExpertExchange::Blocks {
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

at::Tensor RowsUnderWay::wait() {
  work.wait();
  sent.reset();
  const at::Tensor all = std::exchange(received, at::Tensor());
  if (slices == 1) return all;
  const int64_t R = all.size(0) / slices;
  const at::Tensor sum_RD = pooled_empty({R, all.size(1)}, at::kFloat).copy_(all.narrow(0, 0, R));
  for (int64_t slice = 1; slice < slices; ++slice) sum_RD.add_(all.narrow(0, slice * R, R));
  return sum_RD;
}

ExpertExchange::ExpertExchange(const at::Tensor& ids, const at::Tensor& weights, const ExpertRanks& ranks)
    : ranks_(ranks) {
  const at::Tensor ids_TK = ids.contiguous(), weights_TK = weights.contiguous();
  const int64_t T = ids_TK.size(0), K = ids_TK.size(1), N = ranks.parts;
  const int64_t P = ranks.group->size(), L = ranks.num_experts, E = P * L / ranks.slices;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t first = T * n / N, count = T * (n + 1) / N - first;
    parts_.push_back({.first_token = first,
                      .dispatch = make_dispatch(ids_TK.const_data_ptr<int64_t>() + first * K,
                                                weights_TK.const_data_ptr<float>() + first * K, count, K, E)});
  }
  const Counts counts_PLN = exchange_counts();
  for (int64_t n = 0; n < N; ++n) {
    TokenPart& part = parts_[static_cast<size_t>(n)];
    std::vector<int32_t> ids_A;
    for (int64_t p = 0; p < P; ++p) {
      const int64_t first = p * L % E;
      const auto before = static_cast<int64_t>(ids_A.size());
      for (int64_t l = 0; l < L; ++l)
        ids_A.insert(ids_A.end(), static_cast<size_t>(counts_PLN[(p * L + l) * N + n]), static_cast<int32_t>(l));
      part.sent_P.push_back(part.dispatch.offset_E1[first + L] - part.dispatch.offset_E1[first]);
      part.arriving_P.push_back(static_cast<int64_t>(ids_A.size()) - before);
    }
    part.arriving_ids_A1 = at::empty({static_cast<int64_t>(ids_A.size()), 1}, at::kInt);
    std::copy(ids_A.begin(), ids_A.end(), part.arriving_ids_A1.mutable_data_ptr<int32_t>());
  }
}

// counts_PLN[p, l, n]: what rank p sends to expert l of this rank in part n.
Counts ExpertExchange::exchange_counts() const {
  const auto N = static_cast<int64_t>(parts_.size());
  const Counts entries_P(static_cast<size_t>(ranks_.group->size()), ranks_.num_experts * N);
  Counts sent_EN, counts_PLN(entries_P.size() * static_cast<size_t>(entries_P[0]));
  for (size_t e = 0; e + 1 < parts_[0].dispatch.offset_E1.size(); ++e) {
    for (const TokenPart& part : parts_) sent_EN.push_back(part.dispatch.offset_E1[e + 1] - part.dispatch.offset_E1[e]);
  }
  start(sent_EN.data(), {entries_P, sizeof(int64_t), ranks_.slices}, counts_PLN.data(), {entries_P, sizeof(int64_t)},
        "counts")
      .wait();
  return counts_PLN;
}

Work ExpertExchange::start(const void* input, const Blocks& sent, void* output, const Blocks& received,
                           const char* what) const {
  return ranks_.exchange->start({input, sent.bytes, sent.offsets, output, received.bytes, received.offsets},
                                ranks_.label + " " + what);
}

void ExpertExchange::progress() const noexcept {
  try {
    ranks_.group->progress();
  } catch (const CommError&) {
    // The group stays broken.
  }
}

RowsUnderWay ExpertExchange::start_to_experts(const TokenPart& part, const at::Tensor& rows_RD,
                                              const char* what) const {
  const int64_t bytes = row_bytes(rows_RD);
  RowsUnderWay rows{.sent = rows_RD,
                    .received = pooled_empty({part.arriving_ids_A1.size(0), rows_RD.size(1)}, rows_RD.scalar_type())};
  rows.work = start(rows_RD.const_data_ptr(), {part.sent_P, bytes, ranks_.slices}, rows.received.mutable_data_ptr(),
                    {part.arriving_P, bytes}, what);
  return rows;
}

RowsUnderWay ExpertExchange::start_from_experts(const TokenPart& part, const at::Tensor& rows_AD,
                                                const char* what) const {
  const int64_t bytes = row_bytes(rows_AD), R = part.dispatch.num_rows();
  RowsUnderWay rows{.sent = rows_AD,
                    .received = pooled_empty({ranks_.slices * R, rows_AD.size(1)}, rows_AD.scalar_type()),
                    .slices = ranks_.slices};
  rows.work = start(rows_AD.const_data_ptr(), {part.arriving_P, bytes}, rows.received.mutable_data_ptr(),
                    {part.sent_P, bytes}, what);
  return rows;
}

}  // namespace coterie
