"""Experts in plain PyTorch: a loop over the experts, each with its tokens. Parameters are one per expert,
as in a ModuleList; slices of one large parameter would cost a whole gradient each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from worker import route, serve, weights_of


class LoopLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        weights = weights_of(cell)
        self.top_k = cell["top_k"]
        self.router = nn.Parameter(weights.router_ED)
        self.up = nn.ParameterList(weights.up_EFD.unbind(0))
        self.down = nn.ParameterList(weights.down_EDF.unbind(0))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = route(x_TD, self.router, self.top_k)
        out_TD = torch.zeros_like(x_TD)
        for expert in ids_TK.unique().tolist():
            token, choice = torch.where(ids_TK == expert)
            y = linear(gelu(linear(x_TD[token], self.up[expert])), self.down[expert])
            out_TD.index_add_(0, token, y * weights_TK[token, choice, None].to(y.dtype))
        return out_TD


serve({"layer": LoopLayer})
