"""`coterie bench infer`: a model served by us and by our peers, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from coterie.benchmarks import dense_vs_moe as comparison
from coterie.benchmarks import infer as inference
from coterie.benchmarks import infer_contestants
from coterie.benchmarks.worker import BenchError
from coterie.cli.console import JsonOption, human_bytes, human_count, notes, print_json, results

_COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())


def infer(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A directory as benches/make_model.py makes it.")],
    dtype: Annotated[str, typer.Option(help=f"Of our weights: {', '.join(infer_contestants.OUR_BITS)}.")] = "bf16",
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 512,
    generate: Annotated[int, typer.Option(min=1, help="Tokens that are decoded.")] = 128,
    batch: Annotated[str, typer.Option(help="Sequences at once.")] = "1,8,32",
    context: Annotated[
        int, typer.Option(min=0, help="Tokens before the decoded ones; 0: as many as --prompt. Fewer take less time.")
    ] = 0,
    peers: Annotated[str, typer.Option(help="Known: " + ", ".join(infer_contestants.PEERS))] = ",".join(
        infer_contestants.PEERS
    ),
    threads: Annotated[int, typer.Option(min=1, help="Threads of every system.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every system.")] = 3,
    cache: Annotated[
        Path | None, typer.Option(help="Where GGUF files of the model are kept; if not given, MODEL-bench.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Serving: seconds to the first token of a new process, prefill, decoding of one sequence and of many, memory."""
    settings = infer_contestants.Settings(prompt, generate, _batches(batch), context or None, threads, rounds)
    names = [peer for peer in peers.split(",") if peer]
    opened = infer_contestants.Model.open(model, cache)
    field = {one: infer_contestants.contestants(opened, one, names, settings) for one in _dtypes(dtype)}
    with Progress(*_COLUMNS, console=notes, transient=True) as bars:
        bar = bars.add_task("")
        measured = inference.run(opened, field, settings, lambda what: bars.update(bar, description=what))
    if json:
        print_json(measured)
    else:
        _print(measured)


def dense_vs_moe(
    models: Annotated[str, typer.Option(help="The first is what the others are compared with.")] = ",".join(
        comparison.SHAPES
    ),
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(infer_contestants.OUR_BITS)}.")] = "int4",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    generate: Annotated[int, typer.Option(min=1, help="Tokens that are decoded.")] = 64,
    batch: Annotated[str, typer.Option(help="Sequences at once.")] = "1,32",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every model.")] = 3,
    json: JsonOption = False,
) -> None:
    """Latency per token and memory of models of equal quality: 1.3 billion dense parameters, and 350 million with
    experts as DeepSpeed-MoE has them. Weights are random, made in memory."""
    if len(_dtypes(dtype)) != 1:
        raise BenchError(f"--dtype: one of them, not {dtype!r}")
    subjects = comparison.subjects([name for name in models.split(",") if name], dtype)
    settings = comparison.Settings(prompt, generate, _batches(batch), threads, rounds)
    with Progress(*_COLUMNS, console=notes, transient=True) as bars:
        bar = bars.add_task("")
        measured = comparison.run(subjects, settings, lambda what: bars.update(bar, description=what))
    if json:
        print_json(measured)
    else:
        _print_models(measured)


def _print_models(measured: dict[str, Any]) -> None:
    machine, models = measured["machine"], measured["models"]
    results.print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, load {machine['load_1min']:.1f}")
    results.print(f"{measured['dtype']}, {measured['read_gb_per_s']:.0f} GB/s; ms for a token of each sequence")
    batches = list(dict.fromkeys(batch for model in models for batch in model["ms_per_token"]))
    names = ["weights", "active", *(name for batch in batches for name in (f"batch {batch}", "faster")), "memory"]
    columns = (Column(name, justify="right", min_width=max(7, len(name)), no_wrap=True) for name in names)
    widest = max(len(model["name"]) for model in models)
    table = Table(Column("model", min_width=widest, no_wrap=True), *columns, box=box.SIMPLE, padding=0)
    for model in models:
        cells = [human_count(model["parameters"]), human_count(model["active_parameters"])]
        for batch in batches:
            cells += [_number(model["ms_per_token"].get(batch)), *_ratios(model["speedup"].get(batch), {})]
        table.add_row(model["name"], *cells, human_bytes(model["rss_bytes"]) if model["rss_bytes"] else "-")
    results.print(table)
    for model in models:
        if "reason" in model:
            results.print(f"{model['name']}: {model['reason']}")


def _dtypes(text: str) -> list[str]:
    for dtype in text.split(","):
        if dtype not in infer_contestants.OUR_BITS:
            raise BenchError(f"--dtype: {dtype!r} is none of {', '.join(infer_contestants.OUR_BITS)}")
    return list(dict.fromkeys(text.split(",")))


def _batches(text: str) -> tuple[int, ...]:
    for size in text.split(","):
        if not size.isdecimal() or int(size) < 1:
            raise BenchError(f"--batch: {size!r} is no number from 1 up")
    return tuple(dict.fromkeys(int(size) for size in text.split(",")))


def _print(measured: dict[str, Any]) -> None:
    machine, model, settings = measured["machine"], measured["model"], measured["settings"]
    results.print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, load {machine['load_1min']:.1f}")
    results.print(
        f"{human_count(model['parameters'])} parameters, {human_count(model['read_parameters'])} read for a token; "
        f"prompt {settings['prompt']}, {settings['context']} tokens before {settings['generate']} decoded ones; "
        f"{settings['rounds']} rounds, medians; tokens/s"
    )
    batches = list(measured["rows"][0]["decode_tokens_per_s"])
    names = ["first s", "mapped s", "prefill", *(f"batch {batch}" for batch in batches), "memory", "of read"]
    widest = max(len(name) for row in measured["rows"] for name in ("coterie", *row["peers"]))
    columns = (Column(name, justify="right", min_width=max(7, len(name)), no_wrap=True) for name in names)
    table = Table(Column("system", min_width=widest, no_wrap=True), *columns, box=box.SIMPLE, padding=0)
    for row in measured["rows"]:
        table.add_section()
        table.add_row(row["dtype"], style="bold")
        for name, figures in {"coterie": row, **row["peers"]}.items():
            table.add_row(name, *_figures(figures))
            table.add_row("  memory, GB/s", "", "", *map(_number, figures["read_gb_per_s"].values()), style="dim")
        table.add_row("to the best", "", "", *_ratios(row["ratio_prefill"], row["ratio_decode"]))
        if "ratio_decode_any_type" in row:
            table.add_row("to any type", "", "", "", *_ratios(None, row["ratio_decode_any_type"])[1:])
    results.print(table)
    for reason in dict.fromkeys(_reasons(measured["rows"])):
        results.print(reason)


def _figures(figures: dict[str, Any]) -> list[str]:
    share = figures["share_of_bandwidth"]
    rates = (figures["prefill_tokens_per_s"], *figures["decode_tokens_per_s"].values())
    return [
        _number(figures["first_token_s"]),
        _number(figures["first_token_mmap_s"]),
        *map(_number, rates),
        human_bytes(figures["rss_bytes"]) if figures["rss_bytes"] else "-",
        "-" if share is None else f"{share:.0%}",
    ]


def _ratios(prefill: float | None, decode: dict[str, float | None]) -> list[str]:
    return ["-" if ratio is None else f"{ratio:.2f}x" for ratio in (prefill, *decode.values())]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['dtype']}: {name}: {reason}"
        for row in rows
        for figures in (row, *row["peers"].values())
        for name, reason in figures.get("reasons", {}).items()
    ]
