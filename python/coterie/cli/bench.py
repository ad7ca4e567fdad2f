"""`coterie bench`: our layers against their peers, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from coterie.benchmarks import comm as communication
from coterie.benchmarks import memory as memory_of_training
from coterie.benchmarks import training
from coterie.benchmarks.cells import DTYPE_BYTES, Cell, LayerCell, LinearCell, StepCell, TrainCell
from coterie.benchmarks.worker import BenchError
from coterie.cli.bench_infer import dense_vs_moe, infer
from coterie.cli.console import JsonOption, human_bytes, human_count, notes, print_json, results

bench = typer.Typer(help="Measure our layers against their peers, side by side in one run.", no_args_is_help=True)
bench.command()(infer)
bench.command()(dense_vs_moe)

Sizes = str  # "8,32": typer has no lists in one option
TokensOption = Annotated[Sizes, typer.Option(help="Tokens in a step.")]
DtypeOption = Annotated[str, typer.Option(help="fp32, bf16.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads of every system.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Turns of every system in a cell.")]
RepeatOption = Annotated[int, typer.Option(min=1, help="The least number of steps in a turn.")]
HiddenOption = Annotated[int, typer.Option(min=1)]


@bench.command()
def layer(
    tokens: TokensOption = "2048",
    hidden: HiddenOption = 512,
    ffn: Annotated[int, typer.Option(min=1, help="Inner size of an expert.")] = 2048,
    experts: Annotated[Sizes, typer.Option(help="Experts of the layer.")] = "8,32,64,128",
    top_k: Annotated[Sizes, typer.Option(help="Experts of a token.")] = "1,2",
    dtype: DtypeOption = "fp32,bf16",
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward pass, else forward.")] = False,
    peers: Annotated[str, typer.Option(help="NAME or NAME+tcmalloc.")] = ",".join(training.PEERS["layer"]),
    threads: ThreadsOption = 2,
    rounds: RoundsOption = 5,
    repeat: RepeatOption = 3,
    json: JsonOption = False,
) -> None:
    """A Mixture-of-Experts layer; options with several values, "8,32", span the cells.

    Forward passes of ours run on packed weights; beside it on weights as they lie (coterie_unpacked).
    """
    cells = [
        LayerCell(d, t, hidden, ffn, e, k, backward)
        for d, t, e, k in product(
            _dtypes(dtype), _sizes("tokens", tokens), _sizes("experts", experts), _sizes("top-k", top_k)
        )
    ]
    _run(cells, peers, training.Settings(threads, rounds, repeat), json)


@bench.command()
def linear(
    tokens: TokensOption = "8,64,2048",
    hidden: HiddenOption = 512,
    outputs: Annotated[int, typer.Option(min=1)] = 2048,
    dtype: DtypeOption = "fp32,bf16",
    backward: Annotated[bool, typer.Option(help="Forward and backward pass, else forward.")] = True,
    peers: Annotated[str, typer.Option(help="NAME or NAME+tcmalloc.")] = ",".join(training.PEERS["linear"]),
    threads: ThreadsOption = 2,
    rounds: RoundsOption = 5,
    repeat: RepeatOption = 3,
    json: JsonOption = False,
) -> None:
    """A linear layer without bias, against torch.nn.Linear."""
    cells = [LinearCell(d, t, hidden, outputs, backward) for d, t in product(_dtypes(dtype), _sizes("tokens", tokens))]
    _run(cells, peers, training.Settings(threads, rounds, repeat), json)


@bench.command()
def step(
    tokens: TokensOption = "4096",
    layers: Annotated[int, typer.Option(min=1, help="Every second one has experts.")] = 8,
    hidden: HiddenOption = 256,
    ffn: Annotated[int, typer.Option(min=1, help="Inner size of a layer or an expert.")] = 1024,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 256,
    vocabulary: Annotated[int, typer.Option(min=2)] = 8192,
    experts: Annotated[Sizes, typer.Option(help="Experts of a layer that has any.")] = "16",
    top_k: Annotated[Sizes, typer.Option(help="Experts of a token.")] = "1",
    dtype: DtypeOption = "fp32,bf16",
    peers: Annotated[str, typer.Option(help="NAME or NAME+tcmalloc.")] = ",".join(training.PEERS["step"]),
    threads: ThreadsOption = 2,
    rounds: RoundsOption = 5,
    repeat: RepeatOption = 3,
    json: JsonOption = False,
) -> None:
    """A step of training a small GPT with experts, as `coterie train` does it."""
    cells = [
        StepCell(d, t, hidden, ffn, e, k, layers, heads, sequence, vocabulary)
        for d, t, e, k in product(
            _dtypes(dtype), _sizes("tokens", tokens), _sizes("experts", experts), _sizes("top-k", top_k)
        )
    ]
    _run(cells, peers, training.Settings(threads, rounds, repeat), json)


@bench.command()
def train(
    ranks: Annotated[int, typer.Option(min=2, help="Processes of --threads threads each.")] = 2,
    tokens: TokensOption = "4096",
    layers: Annotated[int, typer.Option(min=1, help="Every second one has experts.")] = 8,
    hidden: HiddenOption = 256,
    ffn: Annotated[int, typer.Option(min=1, help="Inner size of a layer or an expert.")] = 1024,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 256,
    vocabulary: Annotated[int, typer.Option(min=2)] = 8192,
    experts: Annotated[Sizes, typer.Option(help="Experts of a layer that has any.")] = "16",
    top_k: Annotated[Sizes, typer.Option(help="Experts of a token.")] = "1",
    dtype: DtypeOption = "fp32,bf16",
    peers: Annotated[str, typer.Option(help="NAME or NAME+tcmalloc.")] = ",".join(training.PEERS["train"]),
    threads: ThreadsOption = 1,
    rounds: RoundsOption = 5,
    repeat: RepeatOption = 3,
    json: JsonOption = False,
) -> None:
    """The same step on several ranks: ZeRO-2, experts spread over all of them.

    Beside it ours at stage 0 (coterie_zero0), and as one process of as many threads (coterie_one_rank).
    """
    cells = [
        TrainCell(d, t, hidden, ffn, e, k, layers, heads, sequence, vocabulary, ranks=ranks)
        for d, t, e, k in product(
            _dtypes(dtype), _sizes("tokens", tokens), _sizes("experts", experts), _sizes("top-k", top_k)
        )
    ]
    _run(cells, peers, training.Settings(threads, rounds, repeat), json, ranks)


@bench.command()
def comm(
    ranks: Annotated[int, typer.Option(help="Processes of one thread on this machine.")] = 2,
    launchers: Annotated[str, typer.Option(help="mpi, torchrun (Gloo).")] = "mpi,torchrun",
    json: JsonOption = False,
) -> None:
    """Exchanges and sums between ranks, over each of the launchers."""
    measured = communication.measure(ranks, [launcher for launcher in launchers.split(",") if launcher])
    if json:
        print_json(measured)
        return
    table = Table("operation", *(Column(name, justify="right") for name in ("bytes", "backend", "us", "GB/s")))
    table.box, table.padding = box.SIMPLE, (0, 1)
    for row in sorted(measured["results"], key=lambda row: (row["operation"], row["bytes"], row["us"])):
        figures = (f"{row['us']:.1f}", f"{row['gb_per_s']:.2f}")
        table.add_row(row["operation"], f"{row['bytes']:,}", row["backend"], *figures)
    results.print(f"{measured['ranks']} ranks, {measured['cpus']} processors")
    results.print(table)


@bench.command()
def memory(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Of `coterie train`.")] = None,
    model: Annotated[
        str,
        typer.Option(metavar="|".join(memory_of_training.SHAPES), help="A known shape, where no CONFIG.toml is given."),
    ] = memory_of_training.DEFAULT,
    ranks: Annotated[Sizes, typer.Option(help="Numbers of ranks.")] = "1,2,4,8",
    zero_stage: Annotated[str, typer.Option(help="Stages of ZeRO.")] = "0,1,2",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16; if not given CONFIG's, else bf16.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Count from shapes, without making the model; the large shapes always do.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Bytes that training holds per rank, beside ZeRO's formula.

    Measured on ranks that are threads of this process; ends with code 1 where the two differ by more than 2 %.
    """
    subject = memory_of_training.of_file(config) if config else memory_of_training.named(model)
    counts = plan or (config is None and model != memory_of_training.DEFAULT)
    find = memory_of_training.plan if counts else memory_of_training.measure
    found = find(subject, _sizes("ranks", ranks), _stages(zero_stage), _dtypes(dtype or subject.dtype))
    if json:
        print_json(found)
    else:
        _print_memory(found)
    if found["measured"] and not found["within_tolerance"]:
        raise typer.Exit(1)


def _print_memory(found: dict[str, Any]) -> None:
    params = f"{human_count(found['params_total'])} parameters, {human_count(found['params_active'])} active per token"
    results.print(f"{found['model']}: {params}; bytes per rank, {'measured' if found['measured'] else 'counted'}")
    for dtype, rows in groupby(found["results"], lambda row: row["dtype"]):
        # Minimal widths, so that a narrow terminal wraps lines rather than cutting figures.
        names = ("ranks", "stage", *memory_of_training.KINDS, "total", "formula", "diff")
        columns = (Column(name, justify="right", min_width=max(len(name), 7 * (i > 1))) for i, name in enumerate(names))
        table = Table(*columns, title=dtype, box=box.SIMPLE, padding=0)
        for row in rows:
            figures = [
                _between(row["least"][kind], row["bytes"][kind]) for kind in (*memory_of_training.KINDS, "total")
            ]
            expected, difference = human_bytes(row["formula"]["total"]), f"{row['difference']:+.2%}"
            table.add_row(f"{row['ranks']:,}", str(row["zero_stage"]), *figures, expected, difference)
        results.print(table)
    if found["measured"]:
        results.print(f"largest difference {found['worst_difference']:+.2%}, {found['tolerance']:.0%} are allowed")


def _between(least: float, most: float) -> str:
    shown = [human_bytes(least), human_bytes(most)]
    return " to ".join(dict.fromkeys(shown))


def _run(cells: Sequence[Cell], peers: str, settings: training.Settings, json: bool, ranks: int = 1) -> None:
    for cell in cells:
        cell.check()
    names = [peer for peer in peers.split(",") if peer]
    contestants = training.systems(cells[0].kind, names, ranks, cells[0].backward)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as bars:
        bar = bars.add_task("", total=len(cells) * settings.rounds * len(contestants))

        def progress(cell: Cell, system: str) -> None:
            bars.update(bar, description=f"{_title(asdict(cell))}: {system}", advance=1)

        measured = training.run(cells, contestants, settings, progress)
    if json:
        print_json(measured)
    else:
        _print(measured)


def _dtypes(text: str) -> list[str]:
    for dtype in text.split(","):
        if dtype not in DTYPE_BYTES:
            raise BenchError(f"--dtype: {dtype!r} is neither fp32 nor bf16")
    return list(dict.fromkeys(text.split(",")))


def _sizes(option: str, text: str) -> list[int]:
    for size in text.split(","):
        if not size.isdecimal() or int(size) < 1:
            raise BenchError(f"--{option}: {size!r} is no number from 1 up")
    return list(dict.fromkeys(int(size) for size in text.split(",")))


def _stages(text: str) -> list[int]:
    known = [str(stage) for stage in memory_of_training.STAGES]
    for stage in text.split(","):
        if stage not in known:
            raise BenchError(f"--zero-stage: {stage!r} is none of {', '.join(known)}")
    return list(dict.fromkeys(int(stage) for stage in text.split(",")))


def _print(measured: dict[str, Any]) -> None:
    machine, cells = measured["machine"], measured["cells"]
    results.print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, load {machine['load_1min']:.1f}")
    forward = not cells[0]["backward"]
    # Minimal widths, so that a narrow terminal wraps lines rather than cutting figures.
    names = Column("system", min_width=max(map(len, cells[0]["systems"])), no_wrap=True)
    figures = (Column(name, justify="right", min_width=8, no_wrap=True) for name in _headings(forward))
    table = Table(names, *figures, box=box.SIMPLE, padding=0)
    for cell in cells:
        table.add_section()
        table.add_row(_title(cell), style="bold")
        for name, system in cell["systems"].items():
            table.add_row(name, *_figures(system, cell, forward))
    results.print(table)
    for reason in dict.fromkeys(_reasons(cells)):
        results.print(reason)
    for group in measured["summary"]:
        if "ratio_to_best_peer_mean" in group:
            mean, least = group["ratio_to_best_peer_mean"], group["ratio_to_best_peer_min"]
            over = f"geometric mean of {group['cells']}"
            results.print(f"{group['group']}: {mean:.2f} times as fast as the best peer ({over}), at least {least:.2f}")


def _headings(forward: bool) -> list[str]:
    return ["ms", "min", "GFLOP/s", "peak", *(["limit"] if forward else []), "memory", "/ ours"]


def _figures(system: dict[str, Any], cell: dict[str, Any], forward: bool) -> list[str]:
    """A row of the table; "/ ours" is time over our time, so that above 1 we are faster."""
    if system["ms"] is None:
        return ["-"]
    shares = ("share_of_peak", "share_of_limit") if forward else ("share_of_peak",)
    return [
        f"{system['ms']:.3g}",
        f"{system['min_ms']:.3g}",
        f"{system['gflops']:.3g}",
        *(f"{100 * system[share]:.0f} %" for share in shares),
        human_bytes(system["peak_bytes"]),
        f"{system['ms'] / cell['ours_ms']:.2f}" if cell["ours_ms"] else "-",
    ]


def _title(cell: dict[str, Any]) -> str:
    if "experts" in cell:
        return f"{cell['dtype']} E {cell['experts']} K {cell['top_k']} T {cell['tokens']}"
    return f"{cell['dtype']} T {cell['tokens']}"


def _reasons(cells: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{name}: {system['reason']}"
        for cell in cells
        for name, system in cell["systems"].items()
        if system["ms"] is None
    ]
