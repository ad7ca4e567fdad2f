"""Adam and AdamW over all ranks (ZeRO, src/train/zero_optimizer.h) as a torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coterie.torch.engine_config import AdamConfig, EngineConfig
from coterie.torch.moe.layer import MoE
from coterie.torch.moe.utils import is_moe_param
from coterie.torch.ranks import World, broadcast

if TYPE_CHECKING:
    from coterie._train import ProcessGroup

Groups = Iterable[Tensor] | Iterable[dict[str, Any]]
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Place:
    """Where a parameter belongs in the model of all ranks.

    Parameters
    ----------
    name
        Of the logical tensor.
    first_row, logical_rows
        It is these rows of so many; 0 of 0: all of it.
    replicas
        The ranks that hold the same; None: this one alone.
    """

    name: str
    first_row: int
    logical_rows: int
    replicas: ProcessGroup | None


def places(model: nn.Module, world: World) -> dict[int, Place]:
    """The place of every parameter, by its id.

    Raises
    ------
    ValueError
        A parameter that is marked as an expert's outside of a MoE layer, which nobody knows the place of.
    """
    found = {id(p): Place(name, 0, 0, world.group) for name, p in model.named_parameters()}
    experts = set()
    for prefix, module in model.named_modules():
        if isinstance(module, MoE):
            ranks = world.expert_ranks(module.ep_size)
            for p, name, first_row, rows in module.logical_experts(ranks.index):
                found[id(p)] = Place(f"{prefix}.{name}" if prefix else name, first_row, rows, ranks.replicas)
                experts.add(id(p))
    for name, p in model.named_parameters():
        if is_moe_param(p) and id(p) not in experts and getattr(p, "group_name", "ep_size_1") != "ep_size_1":
            raise ValueError(f"model: parameter {name} is an expert's (allreduce = False) outside of a MoE layer")
    return found


class ZeroOptimizer(torch.optim.Optimizer):
    """What `coterie.torch.initialize` returns as the optimizer.

    Learning rates, betas, eps and weight decay are those of ``param_groups`` at the time of a step, so that torch's
    learning rate schedulers work on it. Its state is in the engine's checkpoints, not in ``state_dict()``.

    Parameters
    ----------
    groups
        As torch.optim's optimizers take them.
    defaults
        Of groups that don't say otherwise.
    model
        Which all of the parameters belong to.
    config, world
        How a step is made up.
    """

    def __init__(
        self, groups: Groups, defaults: AdamConfig, model: nn.Module, config: EngineConfig, world: World
    ) -> None:
        from coterie import _train

        self._settings_type = _train.AdamWSettings
        self._native: Any = None
        options = {
            "lr": defaults.lr,
            "betas": defaults.betas,
            "eps": defaults.eps,
            "weight_decay": defaults.weight_decay,
            "decoupled_weight_decay": defaults.decoupled,
        }
        super().__init__(groups, options)
        self.gradient_clipping = config.gradient_clipping
        self.skips_overflow = config.bf16 and config.check_grad_overflow
        self.world = world
        self.grad_norm: float | None = None
        self.overflow = False
        self._group_of: list[dict[str, Any]] = []  # of every parameter
        trained = self._trained(model, places(model, world))
        self.trained_ids = {id(p) for p, _ in trained}
        self._native = _train.ModuleOptimizer(
            [_train.Parameter(at.name, p, at.first_row, at.logical_rows, at.replicas) for p, at in trained],
            config.gradient_accumulation_steps,
            config.zero_stage,
            config.reduce_bucket_size,
            config.offload_path,
            world.group,
        )

    def _trained(self, model: nn.Module, place_of: dict[int, Place]) -> list[tuple[nn.Parameter, Place]]:
        """In the order of the model, whatever that of the groups."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        strangers = set(group_of) - set(place_of)
        if strangers:
            raise ValueError(f"model_parameters: {len(strangers)} of them are none of the model's")
        trained = []
        for name, p in model.named_parameters():
            if id(p) not in group_of or not p.requires_grad:
                continue
            if p.dtype not in DTYPES or p.device.type != "cpu":
                raise ValueError(f"model: parameter {name} is {p.dtype} on {p.device}, not fp32 or bf16 on the CPU")
            p.data = p.data.contiguous()
            trained.append((p, place_of[id(p)]))
            self._group_of.append(group_of[id(p)])
        if not trained:
            raise ValueError("model_parameters: none of them is to be trained")
        return trained

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._native is not None:
            raise ValueError("add_param_group: parameters can't join after initialize()")
        super().add_param_group(param_group)

    def accumulate_gradients(self) -> None:
        """After each backward pass of a step; collective."""
        self._native.accumulate_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Clip, update, clear the gradients; collective.

        ``grad_norm`` is the norm before clipping. A step that is left out because that is not finite sets ``overflow``.
        """
        if closure is not None:
            raise ValueError("step: a closure is not supported")
        settings = {id(group): self._settings(group) for group in self.param_groups}
        self.grad_norm = self._native.step(
            [settings[id(group)] for group in self._group_of], self.gradient_clipping, self.skips_overflow
        )
        self.overflow = self.skips_overflow and not self.grad_norm < float("inf")

    def _settings(self, group: dict[str, Any]) -> Any:
        return self._settings_type(
            float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], group["decoupled_weight_decay"]
        )

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return self._native.num_steps

    @num_steps.setter
    def num_steps(self, steps: int) -> None:
        self._native.num_steps = steps

    def hyper_parameters(self) -> list[dict[str, Any]]:
        """Of every group, as JSON."""
        return [
            {
                "lr": float(group["lr"]),
                "betas": list(group["betas"]),
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
                "decoupled_weight_decay": group["decoupled_weight_decay"],
            }
            for group in self.param_groups
        ]

    def set_hyper_parameters(self, groups: list[dict[str, Any]]) -> None:
        """What `hyper_parameters` returned."""
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the checkpoint has {len(groups)} parameter groups, the run {len(self.param_groups)}")
        for group, values in zip(self.param_groups, groups, strict=True):
            values = {**values, "betas": tuple(values["betas"])}
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(values.pop("lr"))
            group.update(values)

    def write_shard(self, directory: str, name: str) -> None:
        """This rank's part of a checkpoint."""
        self._native.write_shard(directory, name)

    def load(self, path: str, moments: bool) -> str:
        """Read weights and, unless they are unwanted, moments; collective. Returns the checkpoint's state as JSON."""
        return self._native.load(path, moments)


def take_over(optimizer: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], AdamConfig]:
    """The groups of a torch.optim.Adam or AdamW, the same objects, so that a scheduler made for it goes on to work.

    Raises
    ------
    ValueError
        Another optimizer, an option that is not supported, or one that has taken steps.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        name = type(optimizer).__name__
        raise ValueError(f"optimizer: {name} is not supported, only torch.optim.Adam and torch.optim.AdamW")
    if optimizer.state:
        raise ValueError("optimizer: has taken steps already")
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize", "differentiable"):
            if group.get(option):
                raise ValueError(f"optimizer: {option}=True is not supported")
        group.setdefault("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    optimizer._opt_called = True  # to its schedulers: steps are taken, if not by it
    return optimizer.param_groups, AdamConfig()


def broadcast_model(model: nn.Module, world: World) -> None:
    """Begin with the same values on all ranks that hold the same: those of the first one."""
    if world.group is None:
        return
    place_of = places(model, world)
    for p in model.parameters():
        place = place_of[id(p)]
        if place.replicas is not None:
            broadcast(p, place.replicas, f"first values of {place.name}")
    for name, buffer in model.named_buffers():
        broadcast(buffer, world.group, f"first values of {name}")
