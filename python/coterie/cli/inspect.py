"""`coterie inspect`: what a model or a training checkpoint is made of."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from coterie.cli.console import JsonOption, human_bytes, human_count, print_json, results
from coterie.training import model_of_run, newest_checkpoint


def inspect(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A model directory, a .gguf file, a training checkpoint or a run."),
    ],
    json: JsonOption = False,
) -> None:
    """Show layers, experts per layer, total and active parameters, and bytes per dtype.

    Of a checkpoint also the step, and how it lies in files; of a run its model, or its newest checkpoint.
    """
    facts = describe(_located(model))
    if json:
        print_json(facts)
    else:
        _print(facts)


def _located(path: Path) -> Path:
    """The model of a run, the newest of its checkpoints, a directory's .gguf file, or the path itself."""
    from coterie.llm import resolve_model

    if (path / "run.json").is_file():
        return model_of_run(path)[0]
    if checkpoint := newest_checkpoint(path):
        return checkpoint
    return resolve_model(path) if any(path.glob("*.gguf")) else path


def describe(model: Path) -> dict[str, Any]:
    """What `inspect` shows, as plain values."""
    from coterie import _engine

    config_json = _engine.model_config(str(model))
    config = jsonlib.loads(config_json)
    total, active = _engine.count_parameters(config_json)
    bytes_per_dtype: dict[str, int] = {}
    tensors = _engine.stored_tensors(str(model))
    for tensor in tensors:
        bytes_per_dtype[tensor["dtype"]] = bytes_per_dtype.get(tensor["dtype"], 0) + tensor["bytes"]
    return {
        "model": str(model),
        "params_total": total,
        "params_active": active,
        "bytes": sum(bytes_per_dtype.values()),
        "bytes_per_dtype": bytes_per_dtype,
        "tensors": len(tensors),
        "config": config,
        **_of_checkpoint(model),
    }


def _of_checkpoint(path: Path) -> dict[str, Any]:
    from coterie import _engine

    facts = _engine.checkpoint_facts(str(path))
    if facts is None:
        return {}
    state = jsonlib.loads(facts["state_json"])
    known = {key: state.get(key) for key in ("step", "train_seconds", "sequences", "dtype")}
    return {"checkpoint": {**known, "ranks": facts["files"], "pieces": facts["pieces"]}}


def _print(facts: dict[str, Any]) -> None:
    config = facts["config"]
    summary = Table(show_header=False)
    for name, value in (
        ("parameters", f"{facts['params_total']:,} ({human_count(facts['params_total'])})"),
        ("active per token", f"{facts['params_active']:,} ({human_count(facts['params_active'])})"),
        ("layers", str(len(config["layers"]))),
        ("hidden size", str(config["hidden_size"])),
        ("heads (key/value)", f"{config['num_attention_heads']} ({config['num_key_value_heads']})"),
        ("positions", f"{config['max_position_embeddings']} ({config['position_embedding_type']})"),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("on disk", human_bytes(facts["bytes"])),
        *((f"  {dtype}", human_bytes(count)) for dtype, count in sorted(facts["bytes_per_dtype"].items())),
        *_checkpoint_rows(facts),
    ):
        summary.add_row(name, value)
    results.print(facts["model"])
    results.print(summary)
    layers = Table("layers", "kind", "experts", "top-k", "expert size", "fixed MLP", "residual")
    for span, layer in _runs(config["layers"]):
        if layer["num_experts"]:
            fixed = str(layer["intermediate_size"]) if layer["residual"] != "none" else ""
            row = ("MoE", layer["num_experts"], layer["top_k"], layer["expert_intermediate_size"], fixed)
            layers.add_row(span, *map(str, row), layer["residual"])
        else:
            layers.add_row(span, "dense", "", "", "", str(layer["intermediate_size"]), "")
    results.print(layers)


def _checkpoint_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "checkpoint" not in facts:
        return []
    checkpoint = facts["checkpoint"]
    return [
        ("checkpoint of step", str(checkpoint["step"])),
        ("trained in", str(checkpoint["dtype"])),
        ("ranks (files)", str(checkpoint["ranks"])),
        ("tensors", f"{facts['tensors']:,}, with the optimizer's, in {checkpoint['pieces']:,} pieces"),
    ]


def _runs(layers: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Equal neighbours joined: ("4-7", layer)."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for index, layer in enumerate(layers):
        if runs and runs[-1][2] == layer:
            runs[-1] = (runs[-1][0], index, layer)
        else:
            runs.append((index, index, layer))
    return [(str(first) if first == last else f"{first}-{last}", layer) for first, last, layer in runs]
