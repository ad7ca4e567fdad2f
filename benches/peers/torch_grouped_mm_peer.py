"""Experts with torch's grouped matrix product: tokens sorted by expert, weights as [E, out, in]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, grouped_mm
from worker import route, serve, weights_of


class GroupedLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        weights = weights_of(cell)
        self.top_k = cell["top_k"]
        self.router = nn.Parameter(weights.router_ED)
        self.up = nn.Parameter(weights.up_EFD)
        self.down = nn.Parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = route(x_TD, self.router, self.top_k)
        order = ids_TK.flatten().argsort()
        counts_E = torch.bincount(ids_TK.flatten(), minlength=len(self.router))
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        rows = x_TD[order // self.top_k]
        inner = gelu(grouped_mm(rows, self.up.transpose(1, 2), offs=ends_E))
        y = grouped_mm(inner, self.down.transpose(1, 2), offs=ends_E)
        y = y * weights_TK.flatten()[order, None].to(y.dtype)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        return y[place].view(*ids_TK.shape, -1).sum(1)


if __name__ == "__main__":
    serve({"layer": GroupedLayer})
