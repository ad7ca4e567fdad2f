"""The ranks of a torch.distributed run, as the optimizer and the experts see them.

torch.distributed finds the ranks; what they exchange goes over a Gloo group of our own, so that it never meets what the
program itself sends.
"""

from __future__ import annotations

import atexit
import gc
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from coterie.distributed import DEFAULT_TIMEOUT_S, this_rank

if TYPE_CHECKING:
    from coterie._train import ProcessGroup

BACKENDS = (None, "gloo", "ccl", "mpi")  # DeepSpeed's names for CPUs: all of them are Gloo here


@dataclass
class ExpertRanks:
    """The ranks of one degree of expert parallelism.

    Parameters
    ----------
    degree
        So many neighbouring ranks hold all experts together.
    together, replicas
        Those ranks, and the ranks that hold the same experts; None: this one alone.
    index
        Which part of the experts this rank holds.
    """

    degree: int
    together: ProcessGroup | None
    replicas: ProcessGroup | None
    index: int


@dataclass
class World:
    """All ranks; `group` is None for a single one."""

    rank: int
    size: int
    group: ProcessGroup | None
    of: object = field(repr=False)  # torch's group that it was made for
    experts: dict[int, ExpertRanks] = field(default_factory=dict, repr=False)

    def expert_ranks(self, degree: int) -> ExpertRanks:
        """Collective at the first call for a degree.

        Raises
        ------
        ValueError
            The degree does not divide the ranks.
        """
        if self.size % degree != 0:
            raise ValueError(f"[MoE] ep_size ({degree}) does not divide the number of ranks ({self.size})")
        if degree not in self.experts:
            together = self._split(self.rank // degree, degree, f"ep{degree}")
            replicas = self._split(self.rank % degree, self.size // degree, f"replicas of ep{degree}")
            self.experts[degree] = ExpertRanks(degree, together, replicas, self.rank % degree)
        return self.experts[degree]

    def _split(self, color: int, size: int, name: str) -> ProcessGroup | None:
        if size == self.size:
            return self.group
        return self.group.split(color, self.rank, name) if size > 1 else None


_world: World | None = None


@atexit.register
def _forget_world() -> None:
    """Gloo's threads end with their group, which has to be before the interpreter goes."""
    global _world
    _world = None
    gc.collect()  # engines that hold it, in cycles


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: object = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Initialize torch.distributed, as deepspeed.init_distributed does; nothing when that was done before.

    A process that nobody launched is the only rank. Ranks are started with torchrun.

    Parameters
    ----------
    dist_backend
        Ranks on CPUs talk over Gloo: another backend is an error.
    timeout
        How long a rank waits for the others.
    init_method, rank, world_size
        As for torch.distributed.init_process_group.
    dist_init_required
        False: do nothing.
    auto_mpi_discovery, distributed_port, verbose, config
        Have no effect.

    Raises
    ------
    ValueError
        A backend that is not there, or a launcher other than torchrun.
    """
    if dist_backend not in BACKENDS:
        raise ValueError(f"init_distributed: dist_backend {dist_backend!r} is not supported: ranks talk over gloo")
    if dist.is_initialized() or dist_init_required is False:
        return
    here = this_rank()
    if here.launcher == "mpi" and init_method is None:
        raise ValueError("init_distributed: ranks that mpirun starts don't find each other; start them with torchrun")
    timeout = timeout or timedelta(seconds=DEFAULT_TIMEOUT_S)
    if here.launcher or init_method is not None:
        dist.init_process_group("gloo", init_method=init_method, timeout=timeout, rank=rank, world_size=world_size)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), timeout=timeout, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(here.local_rank))


def world(timeout_s: float = DEFAULT_TIMEOUT_S) -> World:
    """All ranks of the run; collective at the first call."""
    global _world
    init_distributed()
    if _world is None or _world.of is not dist.group.WORLD:
        from coterie import _train

        group = None
        if dist.get_world_size() > 1:
            own = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            group = _train.torch_process_group(own.group_name, timeout_s)
        _world = World(dist.get_rank(), dist.get_world_size(), group, dist.group.WORLD)
    return _world


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def broadcast(tensor: torch.Tensor, group: ProcessGroup, label: str) -> None:
    """Give all ranks of a group what its first one has."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return
    group.broadcast(flat.view(torch.uint8).numpy(), 0, label)
    if flat.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(flat.view_as(tensor))
    else:
        torch.autograd.graph.increment_version(tensor)  # which numpy did not
