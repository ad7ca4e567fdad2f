"""torch's fully_shard (FSDP2) on every block of a GPT whose experts run on torch's grouped matrix product."""

from __future__ import annotations

from gpt import Gpt, Training
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch_grouped_mm_peer import GroupedLayer
from worker import serve


def spread(model: Gpt) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


distributed.init_process_group("gloo")
serve({"train": lambda cell: Training(cell, GroupedLayer, spread)})
