"""DeepSpeed's JSON configuration: what of it `coterie.torch.initialize` honours.

Keys fall in three classes, and no other key is accepted:

- those that are honoured, the fields of `EngineConfig`;
- those that ask for what is always so here, or only say how a GPU gets there (``overlap_comm``,
  ``contiguous_gradients``, ``offload_optimizer`` to the CPU): accepted;
- those of which one value is how it is here (``gradient_predivide_factor``: 1): that value is accepted.

Defaults are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_BUCKET_SIZE = 4 << 20  # elements, as `coterie train`
ADAM_TYPES = ("Adam", "AdamW")

# Of the top level: with these values they change nothing. A block that is not enabled changes nothing either.
_NEUTRAL = {
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1, 1.0),
    "gradient_allreduce_op": ("mean",),
    "communication_data_type": (None,),
    "sparse_gradients": (False,),
    "disable_allgather": (False,),
    "memory_breakdown": (False,),
    "dump_state": (False,),
    "managed_gradient_accumulation": (True,),
    "use_data_before_expert_parallelism": (False,),
}
_SWITCHED_BLOCKS = (
    "amp",
    "autotuning",
    "comms_logger",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "eigenvalue",
    "elasticity",
    "flops_profiler",
    "hybrid_engine",
    "progressive_layer_drop",
    "tensorboard",
    "torch_autocast",
    "wandb",
)
_ANY_VALUE = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")

_ZERO_ANY_VALUE = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "cpu_offload",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "legacy_stage1",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
_ZERO_NEUTRAL = {
    "compute_grad_norm": (True,),
    "ignore_unused_parameters": (True,),
    "load_from_fp32_weights": (True,),
    "zero_hpz_partition_size": (1,),
    "zero_quantized_gradients": (False,),
    "zero_quantized_nontrainable_weights": (False,),
    "zero_quantized_weights": (False,),
}


class _Block:
    """One JSON object; what nobody takes is refused by name."""

    def __init__(self, values: Any, path: str) -> None:
        self.path = path
        if not isinstance(values, Mapping):
            raise ValueError(f"{path or 'config'}: {values!r} is not an object")
        self._left = dict(values)

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def refuse(self, key: str, value: Any, why: str) -> None:
        raise ValueError(f"{self.name(key)}: {value!r} {why}")

    def take(self, key: str, default: Any) -> Any:
        return self._left.pop(key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.refuse(key, value, "is neither true nor false")
        return value

    def whole(self, key: str, default: int | None, least: int = 1) -> int | None:
        """A whole number; JSON's 5e8 is one, too."""
        value = self.take(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
            self.refuse(key, value, f"is not a whole number of at least {least}")
        return int(value)

    def number(self, key: str, default: float, least: float = 0.0) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            self.refuse(key, value, f"is not a number of at least {least:g}")
        return float(value)

    def block(self, key: str) -> _Block:
        return _Block(self.take(key, {}), self.name(key))

    def accept(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            self._left.pop(key, None)

    def neutral(self, allowed: Mapping[str, tuple]) -> None:
        for key, values in allowed.items():
            value = self.take(key, values[0])
            if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
                self.refuse(key, value, f"is not supported, only {json.dumps(values[0])}")

    def done(self) -> None:
        for key in self._left:
            raise ValueError(f"{self.name(key)}: this key is not supported")


@dataclass(frozen=True)
class AdamConfig:
    """The optimizer block: hyper-parameters of groups that have none of their own."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True


@dataclass(frozen=True)
class EngineConfig:
    """What `initialize` honours.

    Parameters
    ----------
    train_batch_size, micro_batch_size, gradient_accumulation_steps
        Samples of a step, of a forward pass of one rank, and passes of a step;
        train_batch_size = micro_batch_size * gradient_accumulation_steps * ranks.
    gradient_clipping
        Largest norm of a step's gradients; 0: none.
    bf16
        Parameters are bf16 with fp32 masters.
    check_grad_overflow
        Of bf16: a step whose gradients aren't finite is left out.
    zero_stage, reduce_bucket_size
        See docs/configuration.md, ``parallel``.
    offload_path
        A directory for the optimizer's states; empty: in memory.
    optimizer
        None: the caller brings one.
    scheduler
        Name and arguments; None: none.
    steps_per_print, wall_clock_breakdown
        A line every so many steps (None: never), and with the times of its parts.
    dataloader_drop_last
        Whether the loader leaves out a last incomplete batch.
    """

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_clipping: float = 1.0
    bf16: bool = False
    check_grad_overflow: bool = True
    zero_stage: int = 0
    reduce_bucket_size: int = DEFAULT_BUCKET_SIZE
    offload_path: str = ""
    optimizer: AdamConfig | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None
    steps_per_print: int | None = None
    wall_clock_breakdown: bool = False
    dataloader_drop_last: bool = False
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


def read_config(config: Mapping[str, Any] | str | os.PathLike, world_size: int) -> EngineConfig:
    """Read DeepSpeed's configuration.

    Parameters
    ----------
    config
        The object, or the path of a JSON file.
    world_size
        Ranks among which a batch is shared.

    Raises
    ------
    ValueError
        One line that names the key and the value: unknown, impossible, or not supported.
    """
    if not isinstance(config, Mapping):
        config = _read_file(Path(config))
    top = _Block(config, "")
    batch, micro_batch, passes = _batch_sizes(top, world_size)
    _refuse_fp16(top.block("fp16"))
    bf16_key = "bfloat16" if "bfloat16" in config else "bf16"
    bf16, check_grad_overflow = _read_bf16(top.block(bf16_key))
    stage, bucket, offload_path = _read_zero(top.take("zero_optimization", {}))
    read = EngineConfig(
        train_batch_size=batch,
        micro_batch_size=micro_batch,
        gradient_accumulation_steps=passes,
        gradient_clipping=top.number("gradient_clipping", 1.0),
        bf16=bf16,
        check_grad_overflow=check_grad_overflow,
        zero_stage=stage,
        reduce_bucket_size=bucket,
        offload_path=offload_path,
        optimizer=_read_optimizer(top),
        scheduler=_read_scheduler(top),
        steps_per_print=top.whole("steps_per_print", None),
        wall_clock_breakdown=top.flag("wall_clock_breakdown", False),
        dataloader_drop_last=top.flag("dataloader_drop_last", False),
        raw=dict(config),
    )
    _read_data_types(top.block("data_types"), bf16)
    top.neutral(_NEUTRAL)
    top.accept(_ANY_VALUE)
    for key in _SWITCHED_BLOCKS:
        values = top.take(key, {})
        if not isinstance(values, Mapping) or values.get("enabled", key == "elasticity" and bool(values)):
            top.refuse(key, values, "is not supported unless its enabled is false")
    top.done()
    return read


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"config: {path}: {error.strerror}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config: {path}: is not JSON: {error}") from None


def _batch_sizes(top: _Block, ranks: int) -> tuple[int, int, int]:
    batch = top.whole("train_batch_size", None)
    micro_batch = top.whole("train_micro_batch_size_per_gpu", None)
    passes = top.whole("gradient_accumulation_steps", None)
    if batch is None and micro_batch is None:
        raise ValueError("train_batch_size: is missing, and so is train_micro_batch_size_per_gpu")
    if passes is None:
        passes = 1 if batch is None or micro_batch is None else batch // (micro_batch * ranks)
    if micro_batch is None:
        micro_batch = batch // (passes * ranks)
    if batch is None:
        batch = micro_batch * passes * ranks
    if batch != micro_batch * passes * ranks or passes < 1:
        raise ValueError(
            f"train_batch_size: {batch} is not train_micro_batch_size_per_gpu ({micro_batch})"
            f" * gradient_accumulation_steps ({passes}) * ranks ({ranks})"
        )
    return batch, micro_batch, passes


def _refuse_fp16(block: _Block) -> None:
    if block.flag("enabled", False):
        block.refuse("enabled", True, "is not supported: kernels for CPUs have no fp16; bf16 takes its place")


def _read_bf16(block: _Block) -> tuple[bool, bool]:
    enabled = block.flag("enabled", False)
    check = block.flag("check_grad_overflow", True)
    block.accept(("immediate_grad_update",))
    block.neutral({"bf16_master_weights_and_grads": (False,), "bf16_optimizer_states": (False,)})
    block.done()
    return enabled, check


def _read_data_types(block: _Block, bf16: bool) -> None:
    block.neutral({"grad_accum_dtype": (None, "fp32"), "param_dtype": (None, "bf16" if bf16 else "fp32")})
    block.done()


def _read_zero(values: Any) -> tuple[int, int, str]:
    """Stage, size of buckets, and a directory for states that are not in memory."""
    if isinstance(values, bool):  # an old form
        values = {"stage": int(values)}
    block = _Block(values, "zero_optimization")
    stage = block.whole("stage", 0, least=0)
    if stage > 2:
        block.refuse("stage", stage, "is not supported: only 0, 1 and 2")
    bucket = block.whole("reduce_bucket_size", DEFAULT_BUCKET_SIZE)
    offload = _Block(block.take("offload_optimizer", None) or {}, block.name("offload_optimizer"))
    device, path = offload.take("device", "none"), offload.take("nvme_path", None)
    if device not in (None, "none", "cpu", "nvme"):
        raise ValueError(f"zero_optimization.offload_optimizer.device: {device!r} is not supported")
    if device == "nvme" and not path:
        raise ValueError("zero_optimization.offload_optimizer.nvme_path: is missing")
    device_of_weights = _Block(block.take("offload_param", None) or {}, block.name("offload_param")).take(
        "device", None
    )
    if device_of_weights not in (None, "none"):
        raise ValueError(f"zero_optimization.offload_param.device: {device_of_weights!r} is not supported")
    block.accept(_ZERO_ANY_VALUE)
    block.accept(tuple(key for key in values if key.startswith("stage3_")))  # of a stage that isn't chosen
    block.neutral(_ZERO_NEUTRAL)
    block.done()
    return stage, bucket, str(path) if device == "nvme" else ""


def _read_optimizer(top: _Block) -> AdamConfig | None:
    values = top.take("optimizer", None)
    if values is None:
        return None
    block = _Block(values, "optimizer")
    kind = block.take("type", None)
    if not isinstance(kind, str) or kind.lower() not in [name.lower() for name in ADAM_TYPES]:
        block.refuse("type", kind, f"is not supported, only {' and '.join(ADAM_TYPES)}")
    params = block.block("params")
    block.accept(("legacy_fusion",))
    block.done()
    decoupled = params.flag("adam_w_mode", True) or kind.lower() == "adamw"
    # torch_adam asks for torch's classes, of which AdamW has another default.
    decay = 1e-2 if params.flag("torch_adam", False) and decoupled else 0.0
    betas = params.take("betas", (0.9, 0.999))
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        params.refuse("betas", betas, "is not a pair of numbers in [0, 1)")
    read = AdamConfig(
        lr=params.number("lr", 1e-3),
        betas=(float(betas[0]), float(betas[1])),
        eps=params.number("eps", 1e-8),
        weight_decay=params.number("weight_decay", decay),
        decoupled=decoupled,
    )
    params.accept(("foreach", "fused"))
    params.neutral({"bias_correction": (True,), "amsgrad": (False,), "fp32_optimizer_states": (True,)})
    params.done()
    return read


def _read_scheduler(top: _Block) -> tuple[str, dict[str, Any]] | None:
    values = top.take("scheduler", None)
    if values is None:
        return None
    block = _Block(values, "scheduler")
    kind = block.take("type", None)
    params = block.take("params", {}) or {}
    block.done()
    if kind is None:
        return None
    if not isinstance(kind, str) or not isinstance(params, Mapping):
        block.refuse("type", kind, "is not a name with an object params beside it")
    return kind, dict(params)
