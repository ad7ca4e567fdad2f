"""`coterie train`: a configuration in, a trained and exported model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from coterie import config as configuration
from coterie import distributed, training
from coterie.cli.console import JsonOption, notes, print_json, results
from coterie.config import Config

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="See docs/configuration.md.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the file; may be repeated."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]
RanksOption = Annotated[
    int | None, typer.Option("--ranks", metavar="N", help="Train as N processes on this machine, each with its share.")
]
LauncherOption = Annotated[
    str, typer.Option("--launcher", metavar="|".join(distributed.LAUNCHERS), help="What starts the ranks.")
]
RestartsOption = Annotated[
    int, typer.Option("--max-restarts", min=0, help="When a rank is lost, all go on from the newest checkpoint.")
]


def train(
    config: ConfigArgument,
    set: SetOption = None,
    resume: ResumeOption = False,
    ranks: RanksOption = None,
    launcher: LauncherOption = "auto",
    max_restarts: RestartsOption = 3,
    json: JsonOption = False,
) -> None:
    """Train a model and export it to OUTPUT_DIR/model.

    Ctrl-C saves a checkpoint and stops; --resume continues as if nothing had happened.
    """
    read = configuration.load(config, set or [])
    if read.distill:
        raise configuration.ConfigError(f"{config}: distill: this section is for `coterie distill`")
    launched = Launched("train", ranks, launcher, max_restarts)
    launched.run(config, read, set or [], resume, json)


@dataclass
class Launched:
    """A command that trains, as the ranks that are asked for; shared by `train` and `distill`."""

    command: str
    ranks: int | None
    launcher: str
    max_restarts: int

    def run(self, path: Path, read: Config, overrides: list[str], resume: bool, json: bool) -> None:
        here = distributed.this_rank()
        read.check_ranks(self.ranks or here.size)
        if here.launcher and self.ranks not in (None, here.size):
            raise distributed.LaunchError(f"--ranks: {self.ranks}, but {here.launcher} has started {here.size}")
        if here.launcher or self.ranks in (None, 1):
            run(read, resume, json)
            return
        read.resolve()  # what is wrong with the input is said once
        arguments = ["-m", "coterie", self.command, str(path), *(f"--set={override}" for override in overrides)]
        arguments += ["--resume"] * resume + ["--json"] * json
        threads = read.train.threads
        raise typer.Exit(distributed.launch(arguments, self.ranks, self.launcher, threads, self.max_restarts))


def run(config: Config, resume: bool, json: bool) -> None:
    """Trains with a progress bar and reports, as one process or one rank."""
    with TrainingBar(config.train.output_dir) as bar:
        summary = training.run(config.resolve(), bar, resume)
    if distributed.this_rank().rank > 0:
        return
    if json:
        print_json(summary)
        return
    results.print(
        f"validation loss {summary['valid_loss']:.4f} nats/token, {summary['valid_loss_per_byte']:.4f} nats/byte;"
        f" {summary['tokens']:,} tokens in {summary['train_seconds']:.0f} s, {summary['tokens_per_s']:,.0f} tokens/s"
    )
    results.print(f"model: {summary['model']}")


class TrainingBar:
    """A rich progress bar of one run: loss, tokens/s, expert balance, time left."""

    def __init__(self, name: str) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=notes,
        )
        self._task = self._progress.add_task(name, total=None, figures="")
        self._valid = ""

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def started(self, first_step: int, total_steps: int) -> None:
        self._progress.update(self._task, completed=first_step, total=total_steps)
        self._progress.start()

    def stepped(self, metrics: dict[str, Any]) -> None:
        per_step = metrics["tokens"] / metrics["step"]
        figures = f"loss {metrics['loss']:.3f}"
        if metrics["kl_loss"]:
            figures += f"  kl {metrics['kl_loss']:.3f}"
        figures += f"{self._valid}  {per_step / metrics['seconds']:,.0f} tok/s"
        if metrics["expert_balance"]:
            # Load of the fullest expert over the mean load, in the worst layer: 1 is even.
            figures += f"  balance {max(metrics['expert_balance']):.2f}"
        if metrics["dropped"]:
            figures += f"  dropped {metrics['dropped']:.1%}"
        self._progress.update(self._task, completed=metrics["step"], figures=figures)

    def evaluated(self, metrics: dict[str, Any]) -> None:
        self._valid = f"  valid {metrics['loss']:.3f}"
