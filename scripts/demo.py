#!/usr/bin/env python3
"""The main job, command by command: real text in; a trained, distilled and served mixture of experts out.

Prepares the corpus, trains a dense model, a MoE and a PR-MoE, distills a Mixture-of-Students, exports
the four, loads them in the engine, and writes runs/demo/{summary.json,table.md,loss.png}. Every step is
a `coterie` command of its own process, so nothing but training ever loads torch.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"dense": "dense", "moe": "MoE", "pr_moe": "PR-MoE", "mos": "MoS"}
CONFIGS = Path("configs/demo")
DATA = Path("data/demo")
OUT = Path("runs/demo")
PROMPT = "KING HENRY.\n"
# Weights in few bits may raise the loss of the PR-MoE by so much: its perplexity by 0.5 % and 3 % at most.
QUANTIZED = {"int8": math.log(1.005), "int4": math.log(1.03)}
# Trainer and engine compute the same loss over the same windows (nats per token).
LOSS_TOLERANCE = 1e-3

console = Console(highlight=False, markup=False)


def main() -> int:
    begun = time.monotonic()
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    heading("1. Train a tokenizer and pack the corpus")
    coterie("data", "shakespeare", "--out", DATA, "--vocab-size", 1024)
    figures: dict[str, dict[str, Any]] = {}
    for number, (name, title) in enumerate(MODELS.items(), start=2):
        heading(f"{number}. {'Distill' if name == 'mos' else 'Train'} {title}")
        figures[name] = coterie("distill" if name == "mos" else "train", CONFIGS / f"{name}.toml")
    heading("6. Export, load in the engine, compare and generate")
    summary, differences = {}, {}
    for name in MODELS:
        summary[name], differences[name] = serve(name, figures[name])
    write_summary(summary)
    plot_losses()
    console.print(f"\n{OUT}/summary.json, table.md, loss.png; {time.monotonic() - begun:.0f} s in all")
    return report_checks(summary, differences)


def heading(text: str) -> None:
    console.print(f"\n{text}", style="bold")


def coterie(*arguments: Any) -> dict[str, Any]:
    """Runs a command with --json and returns its object; its progress bars show on stderr."""
    words = [str(argument) for argument in arguments]
    console.print("$ coterie " + " ".join(json.dumps(word) if " " in word or "\n" in word else word for word in words))
    done = subprocess.run(
        [sys.executable, "-m", "coterie", *words, "--json"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def serve(name: str, trained: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Exports one model and runs it in the engine: its row of the summary, and engine loss - trainer loss."""
    from coterie import config

    settings = config.load(ROOT / CONFIGS / f"{name}.toml")
    exported = OUT / name / "export"
    size = coterie("export", OUT / name, exported)["bytes"]
    facts = coterie("inspect", exported)
    length, tokens = settings.data.sequence_length, settings.train.eval_tokens
    windows = ("--data", DATA, "--sequence-length", length, "--eval-tokens", tokens)
    evaluated = coterie("eval", exported, *windows, "--dtype", "fp32")
    losses = {dtype: coterie("eval", exported, *windows, "--dtype", dtype)["loss"] for dtype in ("bf16", *QUANTIZED)}
    sampling = ("--max-new-tokens", 200, "--temperature", 0.8, "--top-k", 40, "--seed", 1)
    sample = coterie("generate", exported, "--prompt", PROMPT, *sampling)
    console.print(PROMPT + sample["text"], style="cyan")
    row = {
        "params_total": facts["params_total"],
        "params_active": facts["params_active"],
        "valid_loss": evaluated["loss"],
        **{f"valid_loss_{dtype}": loss for dtype, loss in losses.items()},
        "train_tokens_per_s": trained["tokens_per_s"],
        "decode_tokens_per_s": sample["decode_tokens_per_s"],
        "bytes": size,
        "sample": sample["text"],
    }
    return row, evaluated["loss"] - trained["valid_loss"]


def write_summary(summary: dict[str, dict[str, Any]]) -> None:
    """summary.json, and the same figures as a table on the terminal and in table.md."""
    header = ["model", "params", "active", "valid loss", *QUANTIZED, "train tok/s", "decode tok/s", "MB"]
    rows = [
        [
            MODELS[name],
            f"{row['params_total'] / 1e6:.2f}M",
            f"{row['params_active'] / 1e6:.2f}M",
            f"{row['valid_loss']:.4f}",
            *(f"{row[f'valid_loss_{dtype}']:.4f}" for dtype in QUANTIZED),
            f"{row['train_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.0f}",
            f"{row['bytes'] / 1e6:.1f}",
        ]
        for name, row in summary.items()
    ]
    table = Table(*header)
    for cells in rows:
        table.add_row(*cells)
    console.print()
    console.print(table)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    (ROOT / OUT / "table.md").write_text("".join(f"| {' | '.join(cells)} |\n" for cells in lines), encoding="utf-8")
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (ROOT / OUT / "summary.json").write_text(text + "\n", encoding="utf-8")


def plot_losses() -> None:
    """loss.png: validation loss against training time, one line per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from coterie.training import read_metrics

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, title in MODELS.items():
        rows = [row for row in read_metrics(ROOT / OUT / name) if row["kind"] == "eval"]
        axes.plot([row["train_seconds"] for row in rows], [row["loss"] for row in rows], marker="o", label=title)
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / OUT / "loss.png", dpi=120)


def report_checks(summary: dict[str, dict[str, Any]], differences: dict[str, float]) -> int:
    """Prints what has to hold and whether it does; 1 when something doesn't."""
    checks = [
        (
            f"engine and trainer agree on the loss of {title}: difference {differences[name]:+.1e}",
            abs(differences[name]) < LOSS_TOLERANCE,
        )
        for name, title in MODELS.items()
    ]
    for name in ("moe", "pr_moe"):
        gain = summary["dense"]["valid_loss"] - summary[name]["valid_loss"]
        checks.append((f"{MODELS[name]} ends below the dense model: by {gain:.4f}", gain > 0))
    for dtype, most in QUANTIZED.items():
        change = summary["pr_moe"][f"valid_loss_{dtype}"] - summary["pr_moe"]["valid_loss_bf16"]
        text = f"{dtype} changes the perplexity of {MODELS['pr_moe']} in bf16 by {math.expm1(change):+.2%}"
        checks.append((text, change < most))
    for text, holds in checks:
        console.print(f"{'ok    ' if holds else 'FAILED'} {text}", style=None if holds else "bold red")
    return 0 if all(holds for _, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
