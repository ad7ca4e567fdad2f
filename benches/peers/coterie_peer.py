"""Ours: the layers that coterie.torch gives to users of PyTorch, and the trainer of `coterie train`."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpt import LEARNING_RATE
from torch import Tensor, nn
from torch_grouped_mm_peer import GroupedLayer
from worker import linear_weight, rank_and_size, serve, token_batches

from coterie import config, distributed, training
from coterie.torch import RouterConfig, functional


@cache
def begin_packing() -> AbstractContextManager[None]:
    """For as long as the process lives, which is as long as a cell."""
    packed = functional.packed_weights(max_bytes=1 << 62)  # the bench sees to it that there is room
    packed.__enter__()
    return packed


class ExpertLayer(GroupedLayer):
    """The same parameters, on our ops: what coterie.torch.Router and GroupedExperts do. Forward passes run on packed
    weights unless the environment says otherwise; training changes them with every step."""

    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__(cell)
        if cell["backward"] or os.environ.get("BENCH_PACKED") == "0":
            return
        begin_packing()
        with torch.no_grad():
            for _ in range(2):  # they are packed at their second use
                self(torch.zeros(1, cell["hidden"], dtype=self.up.dtype))

    def facts(self) -> dict[str, Any]:
        return {"packed_bytes": functional.packed_weight_bytes()}

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = functional.linear(x_TD, self.router, dtype=torch.float32)
        routing = functional.route(logits_TE, self.top_k, RouterConfig())
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        return functional.experts(x_TD, ids_TK, weights_TK, self.up, self.down, activation="gelu", gated=False)


class LinearLayer(nn.Module):
    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear_weight(cell))

    def forward(self, x_TD: Tensor) -> Tensor:
        return functional.linear(x_TD, self.weight)


class TrainerSteps:
    """Steps of the C++ trainer on the model of gpt.py, reading random tokens as `coterie data` packs them. On several
    ranks the experts are spread over all of them, with the ZeRO stage that the environment says, or 2."""

    def __init__(self, cell: dict[str, Any]) -> None:
        self.directory = tempfile.TemporaryDirectory()
        directory = Path(self.directory.name)
        self._write_data(cell, directory / "data")
        experts = [cell["experts"] if layer % 2 else 0 for layer in range(cell["layers"])]
        path = directory / "gpt.toml"
        path.write_text(f"""
[model]
hidden_size = {cell["hidden"]}
num_hidden_layers = {cell["layers"]}
num_attention_heads = {cell["heads"]}
intermediate_size = {cell["ffn"]}
num_experts = {experts}
top_k = {cell["top_k"]}
gated_mlp = false
hidden_act = "gelu"
norm_type = "layer_norm"
position_embedding_type = "learned"
[data]
path = "{directory}/data"
sequence_length = {cell["sequence"]}
[train]
output_dir = "{directory}/run"
tokens = {1000 * cell["tokens"]}
batch_size = {cell["tokens"] // cell["sequence"]}
learning_rate = {LEARNING_RATE}
dtype = "{cell["dtype"]}"
threads = {int(os.environ.get("BENCH_THREADS", cell["threads"]))}
[parallel]
zero_stage = {os.environ.get("BENCH_ZERO_STAGE", 2)}
""")
        self.trainer = training.make_trainer(config.load(path).resolve(), GROUP)

    @staticmethod
    def _write_data(cell: dict[str, Any], directory: Path) -> None:
        directory.mkdir()
        batches = token_batches(cell)
        meta = {"format": 1, "vocab_size": cell["vocabulary"], "dtype": "uint16", "eos_token_id": 0, "sources": []}
        for split, number in (("train", 64), ("valid", 1)):
            packed = b"".join(next(batches).numpy().astype("uint16").tobytes() for _ in range(number))
            (directory / f"{split}.bin").write_bytes(packed)
            meta[split] = {"tokens": len(packed) // 2, "bytes": len(packed), "documents": 1}
        (directory / "meta.json").write_text(json.dumps(meta))

    def step(self) -> None:
        self.trainer.step()


# For as long as the process lives, which a launcher's other ranks end with.
GROUP = distributed.process_group().__enter__() if rank_and_size()[1] > 1 else None
serve({"layer": ExpertLayer, "linear": LinearLayer, "step": TrainerSteps, "train": TrainerSteps})
