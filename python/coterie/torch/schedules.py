"""Learning rate schedules with the names, arguments and values of DeepSpeed's configuration.

A schedule sets the learning rate of every parameter group of an optimizer, once when it is made and then after each
step of the optimizer. With n the number of steps that were taken, minus 1, and W = max(2, warmup_num_steps), the
warm-up w(n) is ln(n + 1) / ln(W) or, "linear", n / W, until n = W:

WarmupLR         min + (max - min) w(n), then max
WarmupDecayLR    the same, then max falls linearly to min at total_num_steps
WarmupCosineLR   a share of each group's own rate: min_ratio + (1 - min_ratio) w(n), then a cosine from 1 down to
                 cos_min_ratio at total_num_steps
OneCycle         cycle_min_lr up to cycle_max_lr and down again, linearly; then min / (1 + rate * steps / step_size).
                 Adam's first beta moves the other way, and the second one is 0.99.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

WARMUP_TYPES = ("log", "linear")
SECOND_BETA = 0.99  # of OneCycle


def make_schedule(name: str, optimizer: Optimizer, params: dict[str, Any]) -> Any:
    """The schedule of a configuration: one of this module, else torch's of that name.

    Raises
    ------
    ValueError
        One line that names the schedule or the argument.
    """
    schedule = SCHEDULES.get(name) or getattr(torch.optim.lr_scheduler, name, None)
    if not isinstance(schedule, type):
        raise ValueError(f"scheduler.type: {name!r} is none of {', '.join(SCHEDULES)} and none of torch's")
    try:
        return schedule(optimizer, **params)
    except TypeError as error:
        raise ValueError(f"scheduler.params: {error}") from None


class _Schedule:
    """What all have in common; `rates` and, where it moves, `first_betas` are functions of the step."""

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration

    def rates(self, n: int) -> list[float]:
        raise NotImplementedError

    def first_betas(self, n: int) -> list[float] | None:
        return None

    def get_lr(self) -> list[float]:
        return self.rates(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        n = self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        self.last_batch_iteration = n
        self._set(self.rates(n), self.first_betas(n))

    def _set(self, rates: list[float], first_betas: list[float] | None) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rates[i])
            else:
                group["lr"] = rates[i]
            if first_betas is not None:
                group["betas"] = (first_betas[i], SECOND_BETA)

    def _per_group(self, value: float | list[float], name: str) -> list[float]:
        groups = len(self.optimizer.param_groups)
        values = list(value) if isinstance(value, list | tuple) else [value] * groups
        if len(values) != groups:
            raise ValueError(f"scheduler.params.{name}: has {len(values)} values for {groups} parameter groups")
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]


class _Warmup:
    """w(n); None after the warm-up."""

    def __init__(self, num_steps: int, kind: str) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"scheduler.params.warmup_num_steps: {num_steps!r} is not a whole number of at least 1")
        if kind not in WARMUP_TYPES:
            raise ValueError(f"scheduler.params.warmup_type: {kind!r} is not one of {WARMUP_TYPES}")
        self.num_steps = max(2, num_steps)
        self.kind = kind

    def __call__(self, n: int) -> float | None:
        if n >= self.num_steps:
            return None
        n = max(n, 0)
        return math.log(n + 1) / math.log(self.num_steps) if self.kind == "log" else n / self.num_steps


class WarmupLR(_Schedule):
    """See the module; without ``warmup_max_lr`` the maximum is each group's own rate."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = self._per_group(warmup_min_lr, "warmup_min_lr")
        self.max_lrs = self._per_group(warmup_max_lr, "warmup_max_lr")
        self.warmup = _Warmup(warmup_num_steps, warmup_type)
        if last_batch_iteration == -1:
            self._set(self.min_lrs, None)

    def after_warmup(self, n: int) -> float:
        return 1.0

    def rates(self, n: int) -> list[float]:
        share = self.warmup(n)
        share = self.after_warmup(n) if share is None else share
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """See the module."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def after_warmup(self, n: int) -> float:
        left, all_of_them = self.total_num_steps - n, self.total_num_steps - self.warmup.num_steps
        return max(0.0, left / max(1.0, all_of_them))


class WarmupCosineLR(_Schedule):
    """See the module."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.warmup = _Warmup(warmup_num_steps, warmup_type)
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        if last_batch_iteration == -1:
            self._set(self.rates(-1), None)

    def ratio(self, n: int) -> float:
        if n < 0:
            return 0.0
        share = self.warmup(n)
        if share is not None:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * share
        progress = (n - self.warmup.num_steps + 1) / max(1, self.total_num_steps - self.warmup.num_steps)
        cosine = (1.0 + math.cos(math.pi * min(1.0, progress))) / 2.0
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)

    def rates(self, n: int) -> list[float]:
        return [rate * self.ratio(n) for rate in self.base_lrs]


class OneCycle(_Schedule):
    """See the module; stairs, where their count is not 0, hold the rate for a while instead of moving it every step."""

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: float | list[float],
        cycle_max_lr: float | list[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.first = cycle_first_step_size
        self.second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        if self.first <= 0 or self.second < 0:
            raise ValueError(f"scheduler.params.cycle_first_step_size: {self.first} and {self.second} make no cycle")
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.stairs = (cycle_first_stair_count, second_stairs)
        self.min_lrs = self._per_group(cycle_min_lr, "cycle_min_lr")
        self.max_lrs = self._per_group(cycle_max_lr, "cycle_max_lr")
        self.momenta = (cycle_min_mom, cycle_max_mom) if cycle_momentum else None
        self.decay_step_size = decay_step_size
        self.decay_rates = (decay_lr_rate, decay_mom_rate)
        if last_batch_iteration == -1:
            self._set(self.min_lrs, self._same(cycle_min_mom) if cycle_momentum else None)

    def _same(self, value: float) -> list[float]:
        return [value] * len(self.optimizer.param_groups)

    def _height(self, n: int) -> float:
        """How far up the cycle is, from 0 to 1; it is one step ahead of n."""
        place = (n + 1) % (self.first + self.second)
        up = place <= self.first
        height = place / self.first if up else (self.first + self.second - place) / self.second
        stairs = self.stairs[0 if up else 1]
        return math.floor(height * stairs) / stairs if stairs > 0 else height

    def _decay(self, n: int, rate: float) -> float:
        steps = n - (self.first + self.second) + 1
        return 1.0 + rate * steps / self.decay_step_size if self.decay_step_size else 1.0

    def rates(self, n: int) -> list[float]:
        if n >= self.first + self.second:
            return [low / self._decay(n, self.decay_rates[0]) for low in self.min_lrs]
        height = self._height(n)
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def first_betas(self, n: int) -> list[float] | None:
        if self.momenta is None:
            return None
        low, high = self.momenta
        if n >= self.first + self.second:
            return self._same(high * self._decay(n, self.decay_rates[1]))
        return self._same(high - (high - low) * self._height(n))


SCHEDULES: dict[str, type[_Schedule]] = {
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
    "OneCycle": OneCycle,
}
