"""Ours: the layers that coterie.torch gives to users of PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from worker import linear_weight, route, serve, weights_of

from coterie.torch import functional


class ExpertLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        weights = weights_of(cell)
        self.top_k = cell["top_k"]
        self.router = nn.Parameter(weights.router_ED)
        self.up = nn.Parameter(weights.up_EFD)
        self.down = nn.Parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = route(x_TD, self.router, self.top_k)
        return functional.experts(x_TD, ids_TK, weights_TK, self.up, self.down, activation="gelu", gated=False)


class LinearLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear_weight(cell))

    def forward(self, x_TD: Tensor) -> Tensor:
        return functional.linear(x_TD, self.weight)


serve({"layer": ExpertLayer, "linear": LinearLayer})
