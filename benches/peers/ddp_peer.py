"""torch's DistributedDataParallel around a GPT whose experts run on torch's grouped matrix product."""

from __future__ import annotations

from gpt import Gpt, Training
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch_grouped_mm_peer import GroupedLayer
from worker import serve


def spread(model: Gpt) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


distributed.init_process_group("gloo")
serve({"train": lambda cell: Training(cell, GroupedLayer, spread)})
