"""Where the command writes: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for programs.")]

# No markup: what is printed holds paths, and brackets in them are theirs.
results = Console(highlight=False, markup=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def human_bytes(count: float) -> str:
    """123.4 MB, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """12.3M, in powers of 1000."""
    for unit in ("", "k", "M", "B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f}T"
