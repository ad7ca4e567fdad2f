"""`coterie quantize`: a model with its matrices in few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from coterie.cli import generation_options as options
from coterie.cli.console import JsonOption, human_bytes, notes, print_json, results
from coterie.cli.sources import model_and_tokenizer
from coterie.data import copy_tokenizer


def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model directory, a .gguf file, or the output_dir of a run.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: int8, int4 (groups of 32) or int4_64.")],
    attention_dtype: options.AttentionDType = "",
    head_dtype: options.HeadDType = "",
    threads: options.Threads = 0,
    json: JsonOption = False,
) -> None:
    """Write a model that loads in few bits without rounding anything, as config.json, safetensors and its tokenizer."""
    from coterie import _engine

    source, tokenizer = model_and_tokenizer(source)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as bars:
        bar = bars.add_task("quantizing")
        _engine.quantize_model(
            str(source),
            str(out),
            dtype,
            attention_dtype,
            head_dtype,
            threads,
            lambda done, total: bars.update(bar, completed=done, total=total),
        )
    copy_tokenizer(tokenizer, out)
    before, after = _bytes(source), _bytes(out)
    if json:
        print_json({"path": str(out), "dtype": dtype, "bytes": after, "source_bytes": before})
    else:
        results.print(f"{out}: {dtype}, {human_bytes(after)} (from {human_bytes(before)})")


def _bytes(model: Path) -> int:
    """Of a model's weights on disk."""
    from coterie import _engine

    return sum(tensor["bytes"] for tensor in _engine.stored_tensors(str(model)))
