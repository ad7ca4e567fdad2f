"""`coterie bench`: our layers against their peers, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coterie import bench as benches
from coterie.cli.console import JsonOption, human_bytes, notes, print_json, results

bench = typer.Typer(help="Measure our layers against their peers, side by side in one run.", no_args_is_help=True)

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
    peers: Annotated[str, typer.Option(help="NAME or NAME+tcmalloc.")] = ",".join(benches.PEERS["layer"]),
    threads: ThreadsOption = 2,
    rounds: RoundsOption = 5,
    repeat: RepeatOption = 3,
    json: JsonOption = False,
) -> None:
    """A Mixture-of-Experts layer; options with several values, "8,32", span the cells."""
    cells = [
        benches.LayerCell(d, t, hidden, ffn, e, k, backward)
        for d, t, e, k in product(
            _dtypes(dtype), _sizes("tokens", tokens), _sizes("experts", experts), _sizes("top-k", top_k)
        )
    ]
    _run(cells, peers, benches.Settings(threads, rounds, repeat), json)


@bench.command()
def linear(
    tokens: TokensOption = "8,64,2048",
    hidden: HiddenOption = 512,
    outputs: Annotated[int, typer.Option(min=1)] = 2048,
    dtype: DtypeOption = "fp32,bf16",
    backward: Annotated[bool, typer.Option(help="Forward and backward pass, else forward.")] = True,
    peers: Annotated[str, typer.Option(help="NAME or NAME+tcmalloc.")] = ",".join(benches.PEERS["linear"]),
    threads: ThreadsOption = 2,
    rounds: RoundsOption = 5,
    repeat: RepeatOption = 3,
    json: JsonOption = False,
) -> None:
    """A linear layer without bias, against torch.nn.Linear."""
    cells = [
        benches.LinearCell(d, t, hidden, outputs, backward)
        for d, t in product(_dtypes(dtype), _sizes("tokens", tokens))
    ]
    _run(cells, peers, benches.Settings(threads, rounds, repeat), json)


def _run(cells: Sequence[benches.Cell], peers: str, settings: benches.Settings, json: bool) -> None:
    for cell in cells:
        cell.check()
    contestants = benches.systems(cells[0].kind, [peer for peer in peers.split(",") if peer])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as bars:
        bar = bars.add_task("", total=len(cells) * settings.rounds * len(contestants))

        def progress(cell: benches.Cell, system: str) -> None:
            bars.update(bar, description=f"{_name(cell)}: {system}", advance=1)

        measured = benches.run(cells, contestants, settings, progress)
    if json:
        print_json(measured)
    else:
        _print(measured)


def _dtypes(text: str) -> list[str]:
    for dtype in text.split(","):
        if dtype not in benches.DTYPE_BYTES:
            raise benches.BenchError(f"--dtype: {dtype!r} is neither fp32 nor bf16")
    return list(dict.fromkeys(text.split(",")))


def _sizes(option: str, text: str) -> list[int]:
    for size in text.split(","):
        if not size.isdecimal() or int(size) < 1:
            raise benches.BenchError(f"--{option}: {size!r} is no number from 1 up")
    return list(dict.fromkeys(int(size) for size in text.split(",")))


def _name(cell: benches.Cell) -> str:
    if isinstance(cell, benches.LayerCell):
        return f"{cell.dtype}, {cell.experts} experts, top {cell.top_k}, {cell.tokens} tokens"
    return f"{cell.dtype}, {cell.tokens} rows"


Column = tuple[str, Callable[[dict[str, Any]], str]]


def _print(measured: dict[str, Any]) -> None:
    machine, cells = measured["machine"], measured["cells"]
    results.print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, load {machine['load_1min']:.1f}")
    columns = _columns(cells)
    table = Table(*(name for name, _ in columns))
    for cell in cells:
        table.add_row(*(show(cell) for _, show in columns))
    results.print(table)
    for group in measured["summary"]:
        if "ratio_to_best_peer_mean" in group:
            mean, least = group["ratio_to_best_peer_mean"], group["ratio_to_best_peer_min"]
            over = f"geometric mean of {group['cells']}"
            results.print(f"{group['group']}: {mean:.2f} times the best peer ({over}), at least {least:.2f}")
    for reason in dict.fromkeys(_reasons(cells)):
        results.print(reason)


def _columns(cells: Sequence[dict[str, Any]]) -> list[Column]:
    """The axes, our figures, then milliseconds of every peer."""
    axes = [axis for axis in ("dtype", "experts", "top_k", "tokens") if axis in cells[0]]
    columns: list[Column] = [(axis, lambda cell, axis=axis: str(cell[axis])) for axis in axes]
    columns += [
        ("ours ms", lambda cell: _number(cell["ours_ms"], 2)),
        ("min", lambda cell: _number(cell["systems"][benches.OURS].get("min_ms"), 2)),
        ("GFLOP/s", lambda cell: _number(cell["ours_gflops"], 0)),
        ("of peak", lambda cell: _percent(cell["share_of_peak"])),
    ]
    if any("share_of_limit" in cell for cell in cells):
        columns += [
            ("of bandwidth", lambda cell: _percent(cell.get("share_of_bandwidth"))),
            ("of limit", lambda cell: f"{_percent(cell.get('share_of_limit'))} {cell.get('limit', '')}"),
        ]
    columns.append(("memory", lambda cell: _memory(cell["systems"][benches.OURS])))
    for peer in cells[0]["peers"]:
        columns.append((f"{peer} ms", lambda cell, peer=peer: _number(cell["peers"][peer], 2)))
    columns.append(("best peer / ours", lambda cell: _number(cell["ratio_to_best_peer"], 2)))
    return columns


def _reasons(cells: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{name}: {system['reason']}"
        for cell in cells
        for name, system in cell["systems"].items()
        if system["ms"] is None
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _memory(system: dict[str, Any]) -> str:
    return human_bytes(system["peak_bytes"]) if system["ms"] is not None else "-"
