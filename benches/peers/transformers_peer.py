"""The experts of Hugging Face's transformers, with experts_implementation="grouped_mm". Nemotron-H's are
the ones that have two matrices, as all systems here; the router is ours, written in torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from worker import route, serve, weights_of


class TransformersLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        weights = weights_of(cell)
        config = SimpleNamespace(
            n_routed_experts=cell["experts"],
            hidden_size=cell["hidden"],
            moe_intermediate_size=cell["ffn"],
            moe_latent_size=None,
            mlp_hidden_act="gelu",
            _experts_implementation="grouped_mm",
        )
        self.top_k = cell["top_k"]
        self.router = nn.Parameter(weights.router_ED)
        self.experts = NemotronHExperts(config)
        self.experts.up_proj = nn.Parameter(weights.up_EFD)
        self.experts.down_proj = nn.Parameter(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = route(x_TD, self.router, self.top_k)
        return self.experts(x_TD, ids_TK, weights_TK.to(x_TD.dtype))

    def facts(self) -> dict[str, Any]:
        return {"version": transformers.__version__}


serve({"layer": TransformersLayer})
