"""`coterie verify`: one training step of a layout of ranks against the same step on one rank."""

from __future__ import annotations

import json as json_module
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from coterie import config as configuration
from coterie import distributed, training
from coterie.cli.console import JsonOption, notes, print_json, results
from coterie.cli.train import ConfigArgument, LauncherOption, SetOption
from coterie.config import Config

_MEANINGS = {
    "loss": "loss",
    "gradient": "gradients",
    "norm": "norm before clipping",
    "weight": "updated weights",
    "uncounted": "elements not there once",
}


def verify(
    config: ConfigArgument,
    set: SetOption = None,
    ranks: Annotated[
        str, typer.Option("--ranks", metavar="N[,N...]", help="How many; several numbers are several layouts.")
    ] = "2",
    launcher: LauncherOption = "auto",
    json: JsonOption = False,
    report: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Check that ranks compute what one rank does: loss, every gradient, the clipping norm, the updated weights.

    One step with the file's [parallel] section (override it with --set) and the same data, beside the step on one
    rank. Exit code 1 when an error is beyond what rounding explains.
    """
    read = configuration.load(config, set or [])
    if distributed.this_rank().launcher:
        layouts = [_verify_here(read)]
        if report:  # of whoever launched us
            _write_on_the_first_rank(report, layouts[0])
            return
    else:
        options = [f"--set={override}" for override in set or []]
        layouts = [_launch(config, read, options, count, launcher) for count in _counts(ranks)]
    if distributed.this_rank().rank == 0:
        print_json({"layouts": layouts}) if json else _print(layouts)
    if not all(layout["passed"] for layout in layouts):
        raise typer.Exit(1)


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise distributed.LaunchError(f"--ranks: must be numbers above 0 with commas between them ({text})")
    return [int(part) for part in parts]


def _verify_here(read: Config) -> dict[str, Any]:
    training.load_torch()
    from coterie import _train

    with distributed.process_group(read.parallel.timeout_s) as group:
        read.check_ranks(group.size)
        model, settings = training.settings_of_rank(read.resolve(), group)
        found = _train.verify(model, settings, group)
        parallel = read.parallel
        layout = {"ranks": group.size, "zero_stage": parallel.zero_stage, "expert_parallel": parallel.expert_parallel}
        return {**layout, "dtype": read.train.dtype, **found}


def _write_on_the_first_rank(path: Path, layout: dict[str, Any]) -> None:
    if distributed.this_rank().rank == 0:
        path.write_text(json_module.dumps(layout), encoding="utf-8")


def _launch(config: Path, read: Config, options: list[str], ranks: int, launcher: str) -> dict[str, Any]:
    read.check_ranks(ranks)
    read.resolve()  # what is wrong with the input is said once
    with tempfile.TemporaryDirectory() as directory, notes.status(f"{ranks} ranks"):
        report = Path(directory) / "report.json"
        arguments = ["-m", "coterie", "verify", str(config), *options, f"--report={report}"]
        code = distributed.launch(arguments, ranks, launcher, read.train.threads)
        if code:
            raise typer.Exit(code)
        return json_module.loads(report.read_text(encoding="utf-8"))


def _print(layouts: list[dict[str, Any]]) -> None:
    for layout in layouts:
        title = (
            f"{layout['ranks']} ranks, ZeRO stage {layout['zero_stage']}, expert parallelism"
            f" {layout['expert_parallel']}, {layout['dtype']}: {'passed' if layout['passed'] else 'FAILED'}"
        )
        table = Table("compared", "worst error", "tolerance", title=title, title_justify="left")
        table.add_column("worst tensor", overflow="fold")
        for key, meaning in _MEANINGS.items():
            row = layout[key]
            wrong = not row["error"] <= row["tolerance"]
            numbers = (f"{row['error']:.2g}", f"{row['tolerance']:.2g}")
            table.add_row(meaning, *numbers, row["tensor"], style="bold red" if wrong else None)
        results.print(table)
