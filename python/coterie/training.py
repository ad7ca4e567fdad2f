"""The loop around `coterie._train.Trainer`: when to evaluate, save and stop, and what is written down.

A run's directory holds

- `run.json`: the resolved model and settings;
- `metrics.jsonl`: one JSON object per step (`"kind": "step"`) and per evaluation (`"kind": "eval"`),
  each with `train_seconds`, the time spent in steps so far; a step's `moe_layers` has for every MoE layer
  `tokens_per_expert` (kept), `dropped` (a share), and of the choices before dropping `entropy` (nats),
  `max_violation` (fullest expert over the mean, minus 1) and `dead_experts`;
- `checkpoints/`: what `--resume` continues from, bit for bit;
- `model/`: the finished model, exported with its tokenizer;
- `events.out.tfevents.*`: for TensorBoard, when asked for.

This module draws nothing: a `Display` is told what happens.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from coterie import distributed
from coterie.config import ConfigError, ResolvedConfig
from coterie.data import copy_tokenizer

if TYPE_CHECKING:
    from coterie._train import ProcessGroup


class MissingPackageError(RuntimeError):
    """Training needs packages that serving does not."""


class Display(Protocol):
    """Is told of a run's progress."""

    def started(self, first_step: int, total_steps: int) -> None: ...

    def stepped(self, metrics: dict[str, Any]) -> None: ...

    def evaluated(self, metrics: dict[str, Any]) -> None: ...


class Interrupted(Exception):
    """Ctrl-C: the run was saved after the step it came in, and can be resumed."""

    def __init__(self, step: int, checkpoint: str) -> None:
        super().__init__(f"stopped after step {step}, saved in {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


def run(config: ResolvedConfig, display: Display, resume: bool = False) -> dict[str, Any]:
    """Trains to the end, or until Ctrl-C; as one of several ranks where somebody has launched them.

    All ranks train, the first one alone speaks and writes.

    Parameters
    ----------
    config : ResolvedConfig
        From `coterie.config.load(...).resolve()`.
    display : Display
        Told of every step and evaluation, on the first rank.
    resume : bool
        Continue from the newest checkpoint in the output directory; without one, start anew. So does a rank that its
        launcher has started again.

    Returns
    -------
    dict
        step, tokens, train_seconds, tokens_per_s, loss (of the last step), valid_loss,
        valid_loss_per_byte, model (the exported directory); the same on all ranks but for the seconds.

    Raises
    ------
    Interrupted
        After Ctrl-C, when the checkpoint is written.
    ConfigError
        When the output directory holds a run already and `resume` is not asked for.
    InvalidArgument
        When the ranks can't share the batches, or were told different things.
    CommError
        When another rank is lost.
    """
    here = distributed.this_rank()
    resume = resume or distributed.is_restart()
    if here.size == 1:
        return _run(config, display, resume, None)
    load_torch()
    with distributed.process_group(config.settings["parallel"]["timeout_s"]) as group:
        told = {"model": config.model, **config.settings, "resume": resume}
        distributed.require_same(group, json.dumps(told), "configuration")
        try:
            return _run(config, display, resume, group)
        except Interrupted as interruption:  # on all ranks: a good end
            stopped = interruption
    if here.rank > 0:
        raise SystemExit(130)
    raise stopped


def _run(config: ResolvedConfig, display: Display, resume: bool, group: ProcessGroup | None) -> dict[str, Any]:
    train = config.settings["train"]
    output_dir = config.output_dir
    if not resume and (output_dir / "checkpoints").exists():
        message = "holds a run already: pass --resume, or choose another directory"
        raise ConfigError(f'{config.source}: train.output_dir: {message} ("{output_dir}")')
    first_rank = group is None or group.rank == 0
    trainer = make_trainer(config, group)
    if resume:
        trainer.resume()
    model_dir = output_dir / "model"
    if first_rank:
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_json(output_dir / "run.json", {"model": config.model, **config.settings})
        display.started(trainer.step_index, trainer.total_steps)
        with _Log(output_dir, trainer, train["tensorboard"]) as log:
            last = _train_to_end(trainer, train, _Written(display, log), group)
        trainer.export(str(model_dir))
        copy_tokenizer(Path(config.settings["data"]["path"]), model_dir)
    else:
        last = _train_to_end(trainer, train, _Silent(), group)
    tokens = trainer.step_index * train["batch_size"] * config.settings["data"]["sequence_length"]
    return {
        "step": trainer.step_index,
        "tokens": tokens,
        "train_seconds": trainer.train_seconds,
        "tokens_per_s": tokens / trainer.train_seconds if trainer.train_seconds else 0.0,
        **last,
        "model": str(model_dir),
    }


def make_trainer(config: ResolvedConfig, group: ProcessGroup | None = None) -> Any:
    """A `coterie._train.Trainer`, of this process alone or of one of the ranks of a group."""
    load_torch()
    from coterie import _train

    return _train.Trainer(*settings_of_rank(config, group), group)


def settings_of_rank(config: ResolvedConfig, group: ProcessGroup | None) -> tuple[str, str]:
    """The model and the settings as JSON for the extension, with what depends on the machine filled in.

    All ranks of the group call this.
    """
    settings = config.settings
    if group:
        train, parallel = dict(settings["train"]), dict(settings["parallel"])
        train["threads"] = train["threads"] or distributed.threads_per_rank(distributed.this_rank().local_size)
        parallel["ranks_per_node"] = parallel["ranks_per_node"] or distributed.ranks_per_node(group)
        settings = {**settings, "train": train, "parallel": parallel}
    return json.dumps(config.model), json.dumps(settings)


def load_torch() -> None:
    """Before the extension, which uses torch's libraries."""
    # torch's OpenMP threads spin for long between two pieces of work by default. When anything else wants a
    # processor, they spin against each other for the rest: a step then takes five times as long.
    # A spin of at most about a millisecond bounds that. Read when torch is loaded; whoever has set it keeps it.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingPackageError("training needs PyTorch: pip install 'coterie[train]'") from None


def model_of_run(run_dir: Path) -> tuple[Path, Path]:
    """The directories that hold a run's model and its tokenizer: of the finished model, or else of the newest
    checkpoint and of the data."""
    model_dir = run_dir / "model"
    if (model_dir / "config.json").is_file():
        return model_dir, model_dir
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{run_dir}: has neither a model nor a checkpoint yet")
    settings = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    return checkpoint, Path(settings["data"]["path"])


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """What `latest` in a directory of checkpoints names; None without one."""
    latest = checkpoints / "latest"
    return checkpoints / latest.read_text(encoding="utf-8").strip() if latest.is_file() else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last one that a crash tore is left out."""
    with open(run_dir / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


class _Silent:
    """The display of a rank that isn't the first."""

    def stepped(self, metrics: dict[str, Any]) -> None: ...

    def evaluated(self, metrics: dict[str, Any]) -> None: ...


class _Written(_Silent):
    """A display whose metrics are logged, too."""

    def __init__(self, display: Display, log: _Log) -> None:
        self._display = display
        self._log = log

    def stepped(self, metrics: dict[str, Any]) -> None:
        self._log.write("step", metrics)
        self._display.stepped(metrics)

    def evaluated(self, metrics: dict[str, Any]) -> None:
        self._log.write("eval", metrics)
        self._display.evaluated(metrics)


def _train_to_end(trainer: Any, train: dict[str, Any], display: _Silent, group: ProcessGroup | None) -> dict[str, Any]:
    step_metrics: dict[str, Any] = {}
    eval_metrics: dict[str, Any] = {}
    with _ctrl_c_after_the_step() as stop:
        while not trainer.finished:
            step_metrics = trainer.step()
            step_metrics["train_seconds"] = trainer.train_seconds
            display.stepped(step_metrics)
            step = trainer.step_index
            if _any_rank(stop.wanted, group):
                trainer.start_save()
                raise Interrupted(step, trainer.finish_save())
            if not trainer.finished and _due(step, train["eval_every"]):
                eval_metrics = _evaluate(trainer, display)
            if _due(step, train["save_every"]) or trainer.finished:
                trainer.start_save()
        eval_metrics = _evaluate(trainer, display)
    trainer.finish_save()
    return {
        "loss": step_metrics.get("loss"),
        "valid_loss": eval_metrics["loss"],
        "valid_loss_per_byte": eval_metrics["loss_per_byte"],
    }


def _any_rank(wanted: bool, group: ProcessGroup | None) -> bool:
    """Ranks stop after the same step, whichever of them Ctrl-C has reached, and when."""
    if group is None:
        return wanted
    flag = np.array([wanted], np.int64)
    group.all_reduce(flag, "max", "stop")
    return bool(flag[0])


def _evaluate(trainer: Any, display: _Silent) -> dict[str, Any]:
    metrics = trainer.evaluate()
    metrics["train_seconds"] = trainer.train_seconds
    display.evaluated(metrics)
    return metrics


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Stop:
    wanted = False


@contextmanager
def _ctrl_c_after_the_step() -> Iterator[_Stop]:
    """The first Ctrl-C is kept until the step is done; a second one interrupts at once."""
    stop = _Stop()

    def handle(number: int, frame: Any) -> None:
        if stop.wanted:
            raise KeyboardInterrupt
        stop.wanted = True

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: nobody sends us signals
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _Log:
    """metrics.jsonl and, when asked for, TensorBoard events. What was logged after the step that the run
    resumes from is dropped, so that its files read like those of a run that was never interrupted."""

    def __init__(self, output_dir: Path, trainer: Any, tensorboard: bool) -> None:
        first = trainer.step_index
        path = output_dir / "metrics.jsonl"
        rows = read_metrics(output_dir) if path.is_file() else []
        self._file = open(path, "w", encoding="utf-8")
        for row in rows:
            # The last evaluation comes after the last checkpoint, and is done again.
            if row["step"] < first or (row["step"] == first and (row["kind"] == "step" or not trainer.finished)):
                self._write_row(row)
        self._writer = _summary_writer(output_dir, first) if tensorboard else None

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()

    def write(self, kind: str, metrics: dict[str, Any]) -> None:
        self._write_row({"kind": kind, **metrics})
        if self._writer:
            prefix = "train" if kind == "step" else "valid"
            for name, value in metrics.items():
                if isinstance(value, int | float) and name not in ("step", "tokens"):
                    self._writer.add_scalar(f"{prefix}/{name}", value, metrics["step"])
            for layer, value in enumerate(metrics.get("expert_balance", ())):
                self._writer.add_scalar(f"expert_balance/{layer}", value, metrics["step"])

    def _write_row(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _summary_writer(output_dir: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingPackageError("train.tensorboard needs TensorBoard: pip install 'coterie[train]'") from None
    return SummaryWriter(str(output_dir), purge_step=first_step + 1)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
