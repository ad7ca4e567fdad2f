"""`coterie data`: text in, a tokenizer and packed tokens out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coterie import corpus as corpora
from coterie import data as packing
from coterie.cli.console import JsonOption, human_bytes, notes, print_json, results


def data(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help='"shakespeare", or .txt, .md, .jsonl files or directories of them.'),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer to train.")] = 4096,
    valid_fraction: Annotated[float, typer.Option(help="Share of the text to validate with, about.")] = 0.05,
    tokenizer: Annotated[Path | None, typer.Option(help="Use the tokenizer of this directory; train none.")] = None,
    separator: Annotated[str, typer.Option(help="A text that parts documents inside .txt and .md files.")] = "",
    license: Annotated[str, typer.Option(help="Licence of your own files, recorded in meta.json.")] = "unstated",
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept [~/.cache/coterie].")] = None,
    json: JsonOption = False,
) -> None:
    """Train a tokenizer on text and pack the text into tokens, split by document.

    Packs into OUT: train.bin, valid.bin, tokenizer.json, meta.json.
    """
    settings = packing.Settings(vocab_size=vocab_size, valid_fraction=valid_fraction, tokenizer=tokenizer)
    settings.check()
    with notes.status("reading text") if notes.is_terminal else nullcontext():
        read = [corpora.read_corpus(source, cache_dir, license, separator) for source in sources]
    columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes) as bars:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        meta = packing.prepare(read, out, settings, progress)
    if json:
        print_json({"path": str(out), **meta})
        return
    table = Table("split", "documents", "bytes", "tokens", "bytes per token")
    for split in ("train", "valid"):
        part = meta[split]
        ratio = part["bytes"] / part["tokens"]
        table.add_row(
            split, f"{part['documents']:,}", human_bytes(part["bytes"]), f"{part['tokens']:,}", f"{ratio:.2f}"
        )
    results.print(table)
    results.print(f"{out}: vocabulary {meta['vocab_size']:,}, {meta['dtype']}")
