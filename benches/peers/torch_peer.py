"""Plain torch: torch.nn.Linear, and a GPT whose experts run on torch's grouped matrix product."""

from __future__ import annotations

from typing import Any

from gpt import Training
from torch import nn
from torch_grouped_mm_peer import GroupedLayer
from worker import linear_weight, serve


def build(cell: dict[str, Any]) -> nn.Module:
    weight = nn.Parameter(linear_weight(cell))
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


serve({"linear": build, "step": lambda cell: Training(cell, GroupedLayer)})
