"""Experts of a layer that are spread over ranks: rows travel to the rank that has their expert, and back.

Legend: T tokens, D hidden, K choices of a token, E experts of the layer, L of this rank, P ranks that hold all of them
together, R = T * K routed rows of this rank, A rows that arrive here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coterie.torch import functional

if TYPE_CHECKING:
    from coterie._train import ProcessGroup


def run_experts_of_ranks(
    experts: nn.Module, num_experts: int, group: ProcessGroup, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Run each token's experts, wherever they are; collective, forward and backward, also for ranks without tokens.

    Parameters
    ----------
    experts
        Those of this rank, a function of rows, ids [rows, 1] counted from this rank's first, and weights [rows, 1].
    num_experts
        E; the ranks of the group hold E / P each, in their order.
    x_TD, ids_TK, weights_TK
        This rank's tokens, their experts (-1: none) and weights.

    Returns
    -------
    Tensor
        [T, D], in x's type or autocast's.
    """
    order_R, offset_E1 = functional.dispatch(ids_TK, num_experts)
    order_R = order_R[: offset_E1[-1]]
    token_R = order_R // ids_TK.shape[1]
    sent_PL = offset_E1.diff().view(group.size, -1)
    arriving_PL = torch.empty_like(sent_PL)
    bytes_L = [sent_PL.shape[1] * sent_PL.element_size()] * group.size
    group.all_to_all_v(sent_PL.numpy(), bytes_L, arriving_PL.numpy(), bytes_L, "rows per expert")
    sent_P, arriving_P = sent_PL.sum(1).tolist(), arriving_PL.sum(1).tolist()
    rows_AD = _Exchange.apply(x_TD[token_R], sent_P, arriving_P, group, "dispatch")
    ids_A = torch.arange(sent_PL.shape[1]).repeat(group.size).repeat_interleave(arriving_PL.flatten())
    out_AD = experts(rows_AD, ids_A[:, None], torch.ones(len(ids_A), 1))
    out_RD = _Exchange.apply(out_AD, arriving_P, sent_P, group, "combine")
    weighted_RD = out_RD.float() * weights_TK.flatten()[order_R, None]
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_R, weighted_RD)
    return out_TD.to(functional.result_type(x_TD))


class _Exchange(torch.autograd.Function):
    """Rows in blocks, one to each rank, become the blocks that each rank sent here; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent_P: list, arriving_P: list, group: ProcessGroup, label: str) -> Tensor:
        ctx.arguments = (arriving_P, sent_P, group, f"backward {label}")
        return _exchange(rows, sent_P, arriving_P, group, label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, *ctx.arguments), None, None, None, None


def _exchange(rows: Tensor, sent_P: list[int], arriving_P: list[int], group: ProcessGroup, label: str) -> Tensor:
    result = rows.new_empty(sum(arriving_P), rows.shape[1])
    row_bytes = rows.shape[1] * rows.element_size()
    group.all_to_all_v(
        rows.detach().contiguous().view(torch.uint8).numpy(),
        [row_bytes * count for count in sent_P],
        result.view(torch.uint8).numpy(),
        [row_bytes * count for count in arriving_P],
        label,
    )
    return result
