"""The validation loss of a model, computed by the engine over the trainer's windows.

A window is sequence_length + 1 tokens, windows start every sequence_length tokens from the start of
valid.bin, and an incomplete last one is left out: what `Trainer.evaluate` sees, so that the two
losses can be held against each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from coterie.data import DataError, read_meta, read_tokens


def evaluate(
    model: str,
    data_dir: Path,
    *,
    sequence_length: int = 0,
    eval_tokens: int = 0,
    dtype: str = "auto",
    threads: int = 0,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    **engine_options: Any,
) -> dict[str, Any]:
    """Loss of `model` on the validation split of a packed data directory.

    Parameters
    ----------
    model : str
        A model directory or a .gguf file.
    data_dir : Path
        A directory made by `coterie data`, with the model's own tokenizer.
    sequence_length : int
        Tokens per window; 0: as many as the model has positions.
    eval_tokens : int
        Tokens to predict, rounded down to whole windows, one at least; 0: all.
    dtype, threads, engine_options
        Of the engine, as for LLM.
    progress : callable
        Wraps the iteration over the windows.

    Returns
    -------
    dict
        loss (nats per token), loss_per_byte (nats per byte of text), perplexity, eval_tokens,
        sequence_length, seconds, tokens_per_s.
    """
    from coterie import _engine

    if sequence_length < 0 or eval_tokens < 0:
        name, value = ("sequence_length", sequence_length) if sequence_length < 0 else ("eval_tokens", eval_tokens)
        raise DataError(f"{name}: must not be negative ({value})")
    meta = read_meta(data_dir)
    ids = read_tokens(data_dir, "valid")
    engine = _engine.Engine(model, dtype=dtype, threads=threads, **engine_options)
    if meta["vocab_size"] > engine.vocab_size:
        message = f"vocab_size: {meta['vocab_size']} exceeds the model's, {engine.vocab_size}"
        raise DataError(f"{data_dir}: {message}: was the data made with the model's tokenizer?")
    length = sequence_length or engine.max_model_len
    num_windows = (len(ids) - 1) // length
    if num_windows < 1:
        raise DataError(f"{data_dir}: valid.bin holds {len(ids)} tokens, less than one window of {length + 1}")
    if eval_tokens:
        num_windows = min(max(eval_tokens // length, 1), num_windows)
    windows = [ids[start : start + length + 1] for start in range(0, num_windows * length, length)]
    begun = time.perf_counter()
    total = sum(engine.negative_log_likelihood(window.tolist()) for window in progress(windows))
    seconds = time.perf_counter() - begun
    loss = total / (num_windows * length)
    return {
        "loss": loss,
        "loss_per_byte": loss * meta["valid"]["tokens"] / meta["valid"]["bytes"],
        "perplexity": math.exp(min(loss, 700.0)),
        "eval_tokens": num_windows * length,
        "sequence_length": length,
        "seconds": seconds,
        "tokens_per_s": num_windows * length / seconds,
    }
