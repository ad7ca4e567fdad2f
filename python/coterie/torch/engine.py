"""Training with DeepSpeed's interface: `initialize` and the engine that it returns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from coterie.torch import engine_checkpoint
from coterie.torch.engine_config import EngineConfig, read_config
from coterie.torch.optimizer import Groups, ZeroOptimizer, broadcast_model, take_over
from coterie.torch.ranks import World, init_distributed, local_rank, world
from coterie.torch.schedules import make_schedule

Optimizers = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


class Engine(nn.Module):
    """A model in training on all ranks; made by `initialize`.

        loss = engine(batch)
        engine.backward(loss)
        engine.step()

    is one micro-batch; every ``gradient_accumulation_steps()`` of them the step is the optimizer's.

    Attributes
    ----------
    module
        The model.
    optimizer, lr_scheduler, training_dataloader
        What `initialize` returns beside the engine.
    global_steps, global_samples, micro_steps, skipped_steps
        What was done so far; a skipped step is one that the check for overflow left out.
    local_rank, global_rank, world_size, device
        This process.
    """

    def __init__(
        self, module: nn.Module, config: EngineConfig, optimizer: ZeroOptimizer, lr_scheduler: Any, ranks: World
    ) -> None:
        super().__init__()
        self.module = module
        self.config = config
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader: DataLoader | None = None
        self.world = ranks
        self.global_rank, self.world_size, self.local_rank = ranks.rank, ranks.size, local_rank()
        self.device = torch.device("cpu")
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self._backward_done = False
        self._seconds = dict.fromkeys(("forward", "backward", "step"), 0.0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__["_modules"].get("module")
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with self._clock("forward"):
            return self.module(*inputs, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add the gradients of a micro-batch, of which `loss` is the mean, to those of the step; collective.

        Returns
        -------
        Tensor
            The loss divided by ``gradient_accumulation_steps()``, unless ``scale_wrt_gas=False``.

        Raises
        ------
        ValueError
            A second call before `step`.
        """
        if self._backward_done:
            raise ValueError("backward: was called already since the last step(); add the losses up before")
        if scale_wrt_gas:
            loss = loss / self.config.gradient_accumulation_steps
        with self._clock("backward"):
            loss.backward(loss.new_tensor(1.0 / self.world_size).expand_as(loss), retain_graph=retain_graph)
            self.optimizer.accumulate_gradients()
        self._backward_done = True
        return loss

    def step(self) -> None:
        """End a micro-batch; at the boundary take the optimizer's step and the scheduler's. Collective."""
        if not self._backward_done:
            raise ValueError("step: there was no backward() since the last one")
        boundary = self.is_gradient_accumulation_boundary()
        self._backward_done = False
        self.micro_steps += 1
        if boundary:
            with self._clock("step"):
                self._take_step()

    def _take_step(self) -> None:
        self.optimizer.step()
        self.zero_grad()
        self.global_steps += 1
        self.global_samples += self.config.train_batch_size
        if self.optimizer.overflow:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self.config.steps_per_print and self.global_steps % self.config.steps_per_print == 0:
            self._report()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that are still in the parameters, those that nobody trains."""
        self.module.zero_grad(set_to_none)

    @contextmanager
    def _clock(self, part: str) -> Any:
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def _report(self) -> None:
        line = f"step={self.global_steps}, skipped={self.skipped_steps}, lr={self.get_lr()}, mom={self.get_mom()}"
        if self.config.wall_clock_breakdown:
            steps = self.config.steps_per_print
            line += "".join(f", {part}={1e3 * s / steps:.2f} ms" for part, s in self._seconds.items())
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        if self.global_rank == 0:
            print(line, flush=True)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-batch is the last one of a step."""
        return (self.micro_steps + 1) % self.config.gradient_accumulation_steps == 0

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights."""
        at_boundary = self.micro_steps > 0 and self.micro_steps % self.config.gradient_accumulation_steps == 0
        return at_boundary and not self.optimizer.overflow

    def train_batch_size(self) -> int:
        """Samples of a step."""
        return self.config.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of a forward pass of this rank."""
        return self.config.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a step."""
        return self.config.gradient_accumulation_steps

    def gradient_clipping(self) -> float:
        """The largest norm of a step's gradients; 0: none."""
        return self.config.gradient_clipping

    def zero_optimization_stage(self) -> int:
        """0, 1 or 2."""
        return self.config.zero_stage

    def zero_optimization(self) -> bool:
        """Whether the optimizer's state is spread over the ranks."""
        return self.config.zero_stage > 0

    def bfloat16_enabled(self) -> bool:
        """Whether the parameters are bf16."""
        return self.config.bf16

    def fp16_enabled(self) -> bool:
        """False."""
        return False

    def steps_per_print(self) -> int | None:
        """Steps between two lines; None: there are none."""
        return self.config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Whether the lines have times."""
        return self.config.wall_clock_breakdown

    def get_global_grad_norm(self) -> float | None:
        """Of the last step's gradients, before clipping; every parameter of the whole model once."""
        return self.optimizer.grad_norm

    def get_lr(self) -> list[float]:
        """Of every parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[tuple[float, float]]:
        """Betas of every parameter group."""
        return [tuple(group["betas"]) for group in self.optimizer.param_groups]

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
    ) -> bool:
        """Save what is needed to go on, in ``save_dir/tag``; collective.

        Parameters
        ----------
        save_dir
            A directory that all ranks see.
        tag
            A name; without one "global_stepN". An older checkpoint of this name is replaced.
        client_state
            Plain data and tensors, which `load_checkpoint` returns.
        save_latest
            Whether ``save_dir/latest`` names it, which `load_checkpoint` takes without a tag.
        """
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        engine_checkpoint.save(self, str(save_dir), tag, dict(client_state or {}), save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from what `save_checkpoint` wrote, with any number of ranks, ZeRO stage and ``ep_size``; collective.

        Parameters
        ----------
        load_dir, tag
            Where; without a tag the latest one.
        load_module_strict
            Only True.
        load_optimizer_states, load_lr_scheduler_states
            Whether moments and hyper-parameters, and the schedule's state, are taken over.
        load_module_only
            Weights and buffers alone.

        Returns
        -------
        path, client_state
            None and None when there is no latest one.

        Raises
        ------
        InvalidArgument
            It is of another model.
        CorruptFile
            It is damaged.
        """
        if not load_module_strict:
            raise ValueError("load_checkpoint: load_module_strict=False is not supported")
        return engine_checkpoint.load(
            self,
            str(load_dir),
            tag,
            moments=load_optimizer_states and not load_module_only,
            schedule=load_lr_scheduler_states and not load_module_only,
            progress=not load_module_only,
        )


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizers | None = None,
    model_parameters: Groups | None = None,
    training_data: Dataset | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: Mapping[str, Any] | str | None = None,
    mesh_param: Any = None,
    config_params: Mapping[str, Any] | str | None = None,
) -> tuple[Engine, ZeroOptimizer, DataLoader | None, Any]:
    """Make a model ready for training on all ranks, as deepspeed.initialize does.

    Parameters
    ----------
    args
        Its deepspeed_config is the configuration when there is no `config`.
    model
        On the CPU. It begins with the first rank's values. With bf16 its parameters become bf16; every parameter's
        memory moves.
    optimizer
        A torch.optim.Adam or AdamW, or a function of the parameters that makes one; its groups are taken over. Without
        one, the configuration's.
    model_parameters
        What is trained: tensors, or groups with hyper-parameters of their own; without any, all that require a
        gradient.
    training_data
        A dataset, of which each rank's loader gives batches of ``train_micro_batch_size_per_gpu``.
    lr_scheduler
        For the optimizer, or a function of it that makes one; without one, the configuration's. The engine steps it.
    dist_init_required
        False: torch.distributed is initialized already.
    collate_fn
        Of the loader.
    config, config_params
        DeepSpeed's configuration, an object or the path of a JSON file (engine_config.py).
    distributed_port
        Has no effect.
    mpu, mesh_param
        Refused: ranks share a model by its experts alone.

    Returns
    -------
    engine, optimizer, training_dataloader, lr_scheduler
        None for a loader or a scheduler that there isn't.

    Raises
    ------
    ValueError
        One line that names the key, the argument or the parameter.
    """
    if model is None:
        raise ValueError("initialize: model is missing")
    for name, value in (("mpu", mpu), ("mesh_param", mesh_param)):
        if value is not None:
            raise ValueError(f"initialize: {name} is not supported")
    init_distributed(dist_init_required=dist_init_required)
    ranks = world()
    read = read_config(_given_config(args, config if config is not None else config_params), ranks.size)
    if hasattr(args, "local_rank"):
        args.local_rank = local_rank()
    _prepare(model, read, ranks)
    own = _make_optimizer(optimizer, model_parameters, model, read, ranks)
    engine = Engine(model, read, own, _make_scheduler(lr_scheduler, own, read), ranks)
    if training_data is not None:
        engine.training_dataloader = _make_loader(training_data, collate_fn, read, ranks)
    return engine, own, engine.training_dataloader, engine.lr_scheduler


def _given_config(args: Any, config: Any) -> Any:
    of_args = getattr(args, "deepspeed_config", None)
    if config is not None and of_args is not None:
        raise ValueError("initialize: there is both a config and args.deepspeed_config")
    if config is None and of_args is None:
        raise ValueError("initialize: config is missing, and so is args.deepspeed_config")
    return of_args if config is None else config


def _prepare(model: nn.Module, config: EngineConfig, ranks: World) -> None:
    for p in model.parameters():
        if config.bf16 and p.dtype == torch.float32:
            p.data = p.data.bfloat16()
    broadcast_model(model, ranks)


def _make_optimizer(
    given: Optimizers | None, parameters: Groups | None, model: nn.Module, config: EngineConfig, ranks: World
) -> ZeroOptimizer:
    if parameters is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
    if given is not None:
        made = given if isinstance(given, torch.optim.Optimizer) else given(parameters)
        groups, defaults = take_over(made)
    elif config.optimizer is not None:
        groups, defaults = parameters, config.optimizer
    else:
        raise ValueError("optimizer: is missing in the configuration, and none was given")
    return ZeroOptimizer(groups, defaults, model, config, ranks)


def _make_scheduler(given: Any, optimizer: ZeroOptimizer, config: EngineConfig) -> Any:
    if given is None:
        return None if config.scheduler is None else make_schedule(config.scheduler[0], optimizer, config.scheduler[1])
    return given if hasattr(given, "step") else given(optimizer)


def _make_loader(data: Dataset, collate: Callable | None, config: EngineConfig, ranks: World) -> DataLoader:
    """Each rank's own samples, in an order that follows from the epoch alone."""
    sampler = None
    if not isinstance(data, IterableDataset):
        sampler = DistributedSampler(data, num_replicas=ranks.size, rank=ranks.rank)
    return DataLoader(
        data,
        batch_size=config.micro_batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=config.dataloader_drop_last,
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --deepspeed, which changes nothing, and --deepspeed_config PATH, which `initialize` reads from its args."""
    group = parser.add_argument_group("training engine")
    group.add_argument("--deepspeed", action="store_true", help="accepted, without effect")
    group.add_argument("--deepspeed_config", metavar="PATH", help="JSON file with DeepSpeed's configuration")
    return parser
