"""torch.nn.Linear."""

from __future__ import annotations

from typing import Any

from torch import nn
from worker import linear_weight, serve


def build(cell: dict[str, Any]) -> nn.Module:
    weight = nn.Parameter(linear_weight(cell))
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


serve({"linear": build})
