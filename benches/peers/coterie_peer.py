"""Ours: the layers of the trainer, as ops of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from worker import linear_weight, serve, weights_of

import coterie._train  # noqa: F401  registers the ops; after torch, whose libraries it uses


class ExpertLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        weights = weights_of(cell)
        self.top_k = cell["top_k"]
        self.router = nn.Parameter(weights.router_ED)
        self.up = nn.Parameter(weights.up_EFD)
        self.down = nn.Parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.ops.coterie.bench_experts(x_TD, self.router, self.up, self.down, self.top_k)


class LinearLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear_weight(cell))

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.ops.coterie.bench_linear(x_TD, self.weight)


serve({"layer": ExpertLayer, "linear": LinearLayer})
