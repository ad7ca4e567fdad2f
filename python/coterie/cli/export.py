"""`coterie export`: a trained model as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import JsonOption, human_bytes, print_json, results
from coterie.cli.sources import model_and_tokenizer
from coterie.data import copy_tokenizer


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A model directory, a .gguf file, a checkpoint, or the output_dir of a run."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    architecture: Annotated[
        str, typer.Option(help='Such as MixtralForCausalLM; "auto" takes one of Hugging Face where one fits.')
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Write a model as config.json, model.safetensors and its tokenizer, for transformers and other readers."""
    from coterie import _engine

    source, tokenizer = model_and_tokenizer(source)
    written = _engine.export_model(str(source), str(out), architecture)
    copy_tokenizer(tokenizer, out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if json:
        print_json({"path": str(out), "architecture": written, "bytes": size})
    else:
        results.print(f"{out}: {written}, {human_bytes(size)}")
