"""Checkpoints of an engine, in DeepSpeed's directories and the format of `coterie train` (docs/training.md).

DIRECTORY/latest                    the newest one's tag
DIRECTORY/TAG/manifest.json         what lies where, with checksums; "state": steps, hyper-parameters
DIRECTORY/TAG/rank-00000.safetensors ...   fp32 masters and moments of what is trained
DIRECTORY/TAG/state.pt              what is not trained, the schedule's state, the client's
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from coterie.torch.engine import Engine

STATE_FILE = "state.pt"


def save(engine: Engine, directory: str, tag: str, client_state: dict[str, Any], latest: bool) -> None:
    """See Engine.save_checkpoint."""
    from coterie import _train

    group = engine.world.group
    checkpoints = _train.CheckpointDirectory(directory)
    if engine.global_rank == 0:
        aside = checkpoints.begin(tag)
        _write_state(Path(aside) / STATE_FILE, engine, client_state)
    if group is not None:
        group.require_same(tag, "tag of a checkpoint")  # also: nobody writes before rank 0 has begun
    engine.optimizer.write_shard(directory, tag)
    if engine.global_rank == 0:
        checkpoints.commit(tag, engine.world_size, json.dumps(_progress(engine)), latest)
    if group is not None:
        group.barrier(f"checkpoint {tag}")


def _progress(engine: Engine) -> dict[str, Any]:
    names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    return {
        **{name: getattr(engine, name) for name in names},
        "optimizer": {"num_steps": engine.optimizer.num_steps, "groups": engine.optimizer.hyper_parameters()},
    }


def _write_state(path: Path, engine: Engine, client_state: dict[str, Any]) -> None:
    schedule = engine.lr_scheduler.state_dict() if hasattr(engine.lr_scheduler, "state_dict") else None
    state = {"untrained": _untrained(engine), "lr_scheduler": schedule, "client_state": client_state}
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _untrained(engine: Engine) -> dict[str, Tensor]:
    """Buffers that the model's state_dict has, and parameters that the optimizer doesn't have."""
    module = engine.module
    trained = {name for name, p in module.named_parameters() if id(p) in engine.optimizer.trained_ids}
    frozen = {name: p.detach() for name, p in module.named_parameters() if name not in trained}
    for name, p in module.named_parameters():
        if name in frozen and getattr(p, "group_name", "ep_size_1") != "ep_size_1":
            raise ValueError(f"checkpoint: {name} is an expert's that is not trained, with ep_size above 1")
    saved = module.state_dict()
    return {**frozen, **{name: buffer for name, buffer in module.named_buffers() if name in saved}}


def load(
    engine: Engine, directory: str, tag: str | None, moments: bool, schedule: bool, progress: bool
) -> tuple[str | None, dict[str, Any] | None]:
    """See Engine.load_checkpoint."""
    path = _find(directory, tag)
    if path is None:
        return None, None
    extra = _read_state(Path(path) / STATE_FILE)  # before anything changes
    state = json.loads(engine.optimizer.load(path, moments))
    _load_untrained(engine, extra["untrained"], path)
    if moments:
        engine.optimizer.num_steps = state["optimizer"]["num_steps"]
        engine.optimizer.set_hyper_parameters(state["optimizer"]["groups"])
    if schedule and engine.lr_scheduler is not None and extra["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(extra["lr_scheduler"])
    if progress:
        engine.global_steps, engine.global_samples = state["global_steps"], state["global_samples"]
        engine.skipped_steps = state["skipped_steps"]
        # A step that was under way is lost with its gradients.
        engine.micro_steps = engine.global_steps * engine.config.gradient_accumulation_steps
    return path, extra["client_state"]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except Exception as error:  # torch has a dozen kinds for a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: is damaged: {reason}") from None


def _find(directory: str, tag: str | None) -> str | None:
    from coterie import _train

    if tag is None:
        return _train.CheckpointDirectory(directory).latest()
    path = Path(directory) / str(tag)
    if not path.is_dir():
        raise ValueError(f"load_checkpoint: {path} is not there")
    if not (path / "manifest.json").is_file():
        raise ValueError(f"load_checkpoint: {path} holds no manifest.json")
    return str(path)


@torch.no_grad()
def _load_untrained(engine: Engine, stored: dict[str, Tensor], path: str) -> None:
    wanted = _untrained(engine)
    if stored.keys() != wanted.keys():
        name = sorted(stored.keys() ^ wanted.keys())[0]
        where = "the model" if name in stored else "the checkpoint"
        raise ValueError(f"{path}/{STATE_FILE}: tensor {name} is not in {where}")
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            shapes = f"{list(stored[name].shape)} instead of {list(tensor.shape)}"
            raise ValueError(f"{path}/{STATE_FILE}: tensor {name}: {shapes}")
        tensor.copy_(stored[name])
