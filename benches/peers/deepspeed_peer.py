"""DeepSpeed's MoE layer as it is shipped: capacity factor 1, tokens above it dropped, random token selection,
its own router (two choices are normalised, the second drawn at random)."""

from __future__ import annotations

import os
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read on import
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from gpt import LEARNING_RATE, MAX_GRAD_NORM, Gpt
from torch import Tensor, distributed, nn
from worker import DTYPES, own_batches, rank_and_size, serve, weights_of


class Expert(nn.Module):
    def __init__(self, hidden: int, ffn: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn, bias=False, dtype=dtype)
        self.down = nn.Linear(ffn, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class DeepSpeedLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        self.cell = cell
        self.moe = MoE(
            hidden_size=cell["hidden"],
            expert=Expert(cell["hidden"], cell["ffn"], DTYPES[cell["dtype"]]),
            num_experts=cell["experts"],
            ep_size=cell.get("ranks", 1),
            k=cell["top_k"],
            min_capacity=min(4, cell["tokens"]),  # it refuses fewer tokens than that
        )
        if cell["kind"] == "layer":  # an engine does it for its model
            self.moe.set_deepspeed_parallelism()
        self._load()

    def _load(self) -> None:
        weights = weights_of(self.cell)
        inner = self.moe.deepspeed_moe
        with torch.no_grad():
            inner.gate.wg.weight.copy_(weights.router_ED)
            experts = inner.experts.deepspeed_experts
            own = slice(rank_and_size()[0] * len(experts), None)  # the layout of ranks that hold them all together
            for expert, up, down in zip(experts, weights.up_EFD[own], weights.down_EDF[own], strict=False):
                expert.up.weight.copy_(up)
                expert.down.weight.copy_(down)

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD, _, self.counts_E = self.moe(x_TD)
        return out_TD

    def facts(self) -> dict[str, Any]:
        """Of the last pass: the share of choices that found their expert full."""
        choices = self.cell["tokens"] * self.cell["top_k"]
        capacity = max(-(-choices // self.cell["experts"]), min(4, self.cell["tokens"]))
        dropped = (self.counts_E - capacity).clamp(min=0).sum().item() / choices
        return {"version": deepspeed.__version__, "dropped": dropped}


class DeepSpeedTraining:
    """Steps of a DeepSpeed engine, in bf16 with fp32 master weights, as it does it: on one rank without ZeRO, on
    several with ZeRO-2 and the experts spread over all of them."""

    def __init__(self, cell: dict[str, Any]) -> None:
        model = Gpt(cell, DeepSpeedLayer).to(DTYPES[cell["dtype"]])
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "parameters"}
        )
        settings = {
            "train_micro_batch_size_per_gpu": cell["tokens"] // cell["sequence"] // cell.get("ranks", 1),
            "gradient_clipping": MAX_GRAD_NORM,
            "bf16": {"enabled": cell["dtype"] == "bf16"},
            "steps_per_print": 10**9,
        }
        if cell["kind"] == "train":
            settings |= {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        self.batches = own_batches(cell)

    def step(self) -> None:
        self.engine.backward(self.engine(next(self.batches)))
        self.engine.step()


if rank_and_size()[1] == 1:
    # A group of this one process, without a port. The first time, DeepSpeed compiles an extension for it.
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed("gloo")
serve({"layer": DeepSpeedLayer, "step": DeepSpeedTraining, "train": DeepSpeedTraining})
