"""`coterie eval`: the validation loss of a model, computed by the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from coterie import evaluation
from coterie.cli import generation_options as options
from coterie.cli.console import JsonOption, notes, print_json, results


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory or a .gguf file.")],
    data: Annotated[Path, typer.Option("--data", help="A directory made by `coterie data`.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens per window; 0: all positions of the model.")] = 0,
    eval_tokens: Annotated[int, typer.Option(help="Tokens to predict; 0: the whole validation split.")] = 0,
    dtype: options.DType = "auto",
    attention_dtype: options.AttentionDType = "",
    head_dtype: options.HeadDType = "",
    weight_cache: options.WeightCache = True,
    cache_dir: options.CacheDir = None,
    mmap: options.Mmap = False,
    expert_cache_bytes: options.ExpertCacheBytes = 0,
    threads: options.Threads = 0,
    json: JsonOption = False,
) -> None:
    """Compute the loss on the validation split, over the same windows as the trainer's evaluation."""
    from coterie.llm import resolve_model

    loss = evaluation.evaluate(
        str(resolve_model(model)),
        data,
        sequence_length=sequence_length,
        eval_tokens=eval_tokens,
        dtype=dtype,
        threads=threads,
        attention_dtype=attention_dtype,
        head_dtype=head_dtype,
        weight_cache=weight_cache,
        weight_cache_dir=str(cache_dir or ""),
        mmap=mmap,
        expert_cache_bytes=expert_cache_bytes,
        progress=lambda windows: track(windows, "evaluating", console=notes),
    )
    if json:
        print_json(loss)
        return
    results.print(
        f"validation loss {loss['loss']:.4f} nats/token, {loss['loss_per_byte']:.4f} nats/byte, perplexity"
        f" {loss['perplexity']:.2f} over {loss['eval_tokens']:,} tokens, {loss['tokens_per_s']:,.0f} tokens/s"
    )
