"""Parameters of experts among those of a model, with the names of deepspeed.moe.utils."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from coterie.torch.moe.layer import MoE

MAX_GROUP_SIZE = 178956971  # elements; DeepSpeed's


def has_moe_layers(model: nn.Module) -> tuple[bool, int]:
    """Whether a model has MoE layers, and the number of experts of the first one."""
    for module in model.modules():
        if isinstance(module, MoE):
            return True, module.num_experts
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    """Whether a parameter is an expert's."""
    return getattr(param, "allreduce", True) is False


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | Sequence[dict[str, Any]], max_group_size: float | None = MAX_GROUP_SIZE
) -> list[dict[str, Any]]:
    """Give the parameters of experts groups of their own.

    The optimizer of `coterie.torch.initialize` doesn't need it: experts are known wherever they are. Groups of their
    own let them have a learning rate or a weight decay of their own.

    Parameters
    ----------
    param_groups
        One group or several, each with "params" and a "name". They are changed: the experts' parameters leave them.
    max_group_size
        Elements of a group of experts, above which it is cut; None: never.

    Returns
    -------
    list
        The groups, then for every one of them and every degree of expert parallelism the experts': with the options of
        the group that they come from, "moe": True and the name of the degree, "ep_size_N".
    """
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    elif not isinstance(param_groups, list | tuple):
        raise ValueError(f"param_groups: {type(param_groups).__name__} is neither a group nor a list of groups")
    groups = list(param_groups)
    split: list[dict[str, Any]] = []
    for group in groups:
        params = list(group["params"])
        group["params"] = [p for p in params if not is_moe_param(p)]
        experts = [p for p in params if is_moe_param(p)]
        for name in dict.fromkeys(p.group_name for p in experts):
            of_name = [p for p in experts if p.group_name == name]
            for part in _cut(of_name, max_group_size):
                split.append({**group, "name": name, "moe": True, "params": part})
    return groups + split


def _cut(params: list[Tensor], max_size: float | None) -> list[list[Tensor]]:
    parts: list[list[Tensor]] = [[]]
    size = 0
    for p in params:
        if max_size is not None and parts[-1] and size + p.numel() > max_size:
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return parts
