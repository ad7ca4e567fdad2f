"""From text to text on a tiny corpus: data, train, interrupt, resume, export, eval, distill, generate."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coterie.training import read_metrics

STEPS = 20
SEQUENCE, BATCH = 32, 4
CONFIG = """
[model]
hidden_size = 32
num_hidden_layers = 3
num_attention_heads = 2
intermediate_size = 48
num_experts = [0, 4, 6]
residual = "sum"
[data]
path = "data"
sequence_length = {sequence}
[train]
output_dir = "run"
tokens = {tokens}
batch_size = {batch}
learning_rate = 3e-3
warmup_tokens = 256
eval_every = 8
save_every = 5
threads = 2
"""
WORDS = "the a small large fox dog king queen walks sleeps sings over under beside river hill and then".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with packed data, a configuration and a finished run."""
    place = tmp_path_factory.mktemp("place")
    (place / "text").mkdir()
    for n in range(6):
        words = [WORDS[(n * n + i * i * (n + 3)) % len(WORDS)] for i in range(600)]
        lines = (" ".join(words[start : start + 8]) + ".\n" for start in range(0, len(words), 8))
        (place / "text" / f"{n}.txt").write_text("".join(lines))
    (place / "tiny.toml").write_text(CONFIG.format(sequence=SEQUENCE, batch=BATCH, tokens=STEPS * BATCH * SEQUENCE))
    coterie(place, "data", "text", "--out", "data", "--vocab-size", 290, "--valid-fraction", 0.2)
    summary = coterie(place, "train", "tiny.toml")
    (place / "summary.json").write_text(json.dumps(summary))
    return place


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "coterie", *(str(argument) for argument in arguments)]


def coterie(place: Path, *arguments: Any) -> dict[str, Any]:
    done = subprocess.run(command(*arguments, "--json"), cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def summary_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "summary.json").read_text())


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(row["step"], row["kind"], row["loss"]) for row in read_metrics(run)]


def test_training_learns_and_writes_its_log(place: Path):
    rows = read_metrics(place / "run")
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["step"] for row in evaluations] == [8, 16, STEPS]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert len(steps[0]["expert_balance"]) == len(steps[0]["moe_layers"]) == 2
    load = steps[0]["moe_layers"][1]
    assert sum(load["tokens_per_expert"]) == BATCH * SEQUENCE * (1 - load["dropped"])
    assert 0 < load["entropy"] <= math.log(len(load["tokens_per_expert"])) + 1e-12
    assert load["max_violation"] >= 0
    assert load["dead_experts"] == load["tokens_per_expert"].count(0)
    summary = summary_of(place)
    assert summary["step"] == STEPS
    assert summary["tokens"] == STEPS * BATCH * SEQUENCE
    assert summary["valid_loss"] == evaluations[-1]["loss"]


@pytest.mark.parametrize("launcher, stage", [("mpi", 1), ("torchrun", 2)])
def test_two_ranks_train_as_one_does(place: Path, launcher: str, stage: int):
    directory = f"two-{launcher}"
    options = ("--set", f"train.output_dir={directory}", "--set", f"parallel.zero_stage={stage}")
    summary = coterie(place, "train", "tiny.toml", "--ranks", 2, "--launcher", launcher, *options)
    of_one, of_two = read_metrics(place / "run"), read_metrics(place / directory)
    assert [(row["kind"], row["step"]) for row in of_two] == [(row["kind"], row["step"]) for row in of_one]
    for one, two in zip(of_one, of_two, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        if one["kind"] == "step":
            assert two["balance_loss"] == pytest.approx(one["balance_loss"], abs=1e-4)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert sum(two["moe_layers"][0]["tokens_per_expert"]) == BATCH * SEQUENCE
    assert summary["valid_loss"] == of_two[-1]["loss"]
    assert (place / directory / "model" / "tokenizer.json").is_file()


def test_ranks_resume_and_are_refused_in_one_line(place: Path):
    options = ("--set", "train.output_dir=ranks", "--ranks", 2)
    half = STEPS // 2 * BATCH * SEQUENCE
    schedule = ("--set", f"train.decay_tokens={STEPS * BATCH * SEQUENCE}")
    coterie(place, "train", "tiny.toml", *options, *schedule, "--set", f"train.tokens={half}")
    resumed = coterie(place, "train", "tiny.toml", *options, *schedule, "--resume")
    assert resumed["step"] == STEPS
    assert resumed["valid_loss"] == pytest.approx(summary_of(place)["valid_loss"], abs=1e-4)
    done = subprocess.run(command("train", "tiny.toml", "--ranks", 3), cwd=place, capture_output=True, text=True)
    assert done.returncode == 2
    message = "batch_size / gradient_accumulation_steps, 4, is not divisible by 3 ranks (4)"
    assert done.stderr == f"coterie: tiny.toml: train.batch_size: {message}\n"


def test_experts_are_spread_over_ranks(place: Path):
    options = (
        "--set",
        "train.output_dir=spread",
        "--set",
        "parallel.expert_parallel=2",
        "--set",
        "parallel.zero_stage=2",
    )
    summary = coterie(place, "train", "tiny.toml", "--ranks", 2, *options)
    for one, two in zip(read_metrics(place / "run"), read_metrics(place / "spread"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    evaluated = coterie(place, "eval", summary["model"], "--data", "data")
    assert evaluated["loss"] == pytest.approx(summary["valid_loss"], abs=1e-4)
    refused = ("--set", "train.output_dir=refused", "--set", "parallel.expert_parallel=3")
    done = subprocess.run(
        command("train", "tiny.toml", "--ranks", 2, *refused), cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "coterie: parallel.expert_parallel: 3 does not divide the 2 ranks\n"


@pytest.mark.parametrize("launcher", ["mpi", "torchrun"])
def test_verify_compares_layouts_with_one_rank(place: Path, launcher: str):
    layouts = coterie(place, "verify", "tiny.toml", "--ranks", "2,4", "--launcher", launcher)["layouts"]
    assert [layout["ranks"] for layout in layouts] == [2, 4]
    for layout in layouts:
        assert layout["passed"]
        assert 0 < layout["gradient"]["error"] < layout["gradient"]["tolerance"]
    done = subprocess.run(command("verify", "tiny.toml", "--ranks", 3), cwd=place, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("coterie: tiny.toml: train.batch_size: ")


def test_states_of_half_the_bytes_in_files(place: Path):
    (place / "scratch").mkdir()
    states = ("--set", "parallel.moments_dtype=bf16", "--set", "parallel.offload_optimizer=scratch")
    options = ("--set", "train.output_dir=light", *states)
    half = ("--set", f"train.tokens={STEPS // 2 * BATCH * SEQUENCE}")
    schedule = ("--set", f"train.decay_tokens={STEPS * BATCH * SEQUENCE}")
    coterie(place, "train", "tiny.toml", *options, *schedule, *half)
    summary = coterie(place, "train", "tiny.toml", *options, *schedule, "--resume")
    # A step differs by the 2^-8 by which its moments are off, of the way that training has gone.
    first = read_metrics(place / "run")[0]["loss"]
    way = first - summary_of(place)["valid_loss"]
    assert summary["valid_loss"] == pytest.approx(summary_of(place)["valid_loss"], abs=way * 2**-4)
    assert not list((place / "scratch").iterdir())
    assert coterie(place, "inspect", "light/checkpoints")["checkpoint"]["step"] == STEPS


def test_a_finished_directory_is_not_overwritten(place: Path):
    done = subprocess.run(command("train", "tiny.toml"), cwd=place, capture_output=True, text=True)
    assert done.returncode == 2
    message = "holds a run already: pass --resume, or choose another directory"
    assert done.stderr.splitlines()[-1] == f'coterie: tiny.toml: train.output_dir: {message} ("run")'


def test_ctrl_c_saves_and_resume_continues_bit_for_bit(place: Path):
    arguments = command("train", "tiny.toml", "--set", "train.output_dir=stopped", "--set", "train.save_every=0")
    process = subprocess.Popen(arguments, cwd=place, stderr=subprocess.PIPE, text=True)
    log = place / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"kind": "step"') >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "continue with --resume" in stderr
    stopped_at = len([row for row in read_metrics(place / "stopped") if row["kind"] == "step"])
    assert 3 <= stopped_at < STEPS
    resumed = coterie(place, "train", "tiny.toml", "--set", "train.output_dir=stopped", "--resume")
    assert losses(place / "stopped") == losses(place / "run")
    assert resumed["valid_loss"] == summary_of(place)["valid_loss"]
    model = Path("model") / "model.safetensors"
    assert (place / "stopped" / model).read_bytes() == (place / "run" / model).read_bytes()


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(place: Path):
    subprocess.run(["cp", "-r", "run", "crashed"], cwd=place, check=True)
    checkpoints = place / "crashed" / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step-*"))
    assert len(names) == 2  # keep_checkpoints
    subprocess.run(["rm", "-r", str(checkpoints / names[1]), str(place / "crashed" / "model")], check=True)
    (checkpoints / "latest").write_text(names[0])
    with open(place / "crashed" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    coterie(place, "train", "tiny.toml", "--set", "train.output_dir=crashed", "--resume")
    assert losses(place / "crashed") == losses(place / "run")


def test_an_unfinished_run_exports_its_newest_checkpoint(place: Path):
    subprocess.run(["cp", "-r", "run", "unfinished"], cwd=place, check=True)
    subprocess.run(["rm", "-r", str(place / "unfinished" / "model")], check=True)
    (place / "unfinished" / "run.json").write_text(
        (place / "run" / "run.json").read_text().replace('"output_dir": "run"', '"output_dir": "unfinished"')
    )
    exported = coterie(place, "export", "unfinished", "unfinished/export")
    assert exported["architecture"] == "CoterieForCausalLM"
    coterie(place, "export", "run", "finished_export")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (place / "unfinished/export" / name).read_bytes() == (place / "finished_export" / name).read_bytes()
    evaluated = coterie(place, "eval", "unfinished/export", "--data", "data")
    assert evaluated["loss"] == pytest.approx(summary_of(place)["valid_loss"], abs=1e-3)
    newest = max((place / "run" / "checkpoints").glob("step-*"))
    coterie(place, "export", newest, "of_checkpoint")
    assert (place / "of_checkpoint/model.safetensors").read_bytes() == (
        place / "finished_export/model.safetensors"
    ).read_bytes()
    assert coterie(place, "eval", newest, "--data", "data")["loss"] == evaluated["loss"]


def test_export_eval_and_generate_agree_with_the_trainer(place: Path):
    exported = coterie(place, "export", "run", "export")
    assert exported["architecture"] == "CoterieForCausalLM"
    assert exported["bytes"] == (place / "export" / "model.safetensors").stat().st_size
    assert (place / "export" / "tokenizer.json").read_bytes() == (place / "data" / "tokenizer.json").read_bytes()
    evaluated = coterie(place, "eval", "export", "--data", "data")
    summary = summary_of(place)
    # Equal in exact arithmetic: fp32 on both sides, sums of some hundred terms.
    assert evaluated["loss"] == pytest.approx(summary["valid_loss"], abs=1e-4)
    assert evaluated["loss_per_byte"] == pytest.approx(summary["valid_loss_per_byte"], abs=1e-4)
    some = coterie(place, "eval", "export", "--data", "data", "--eval-tokens", 100, "--sequence-length", 16)
    assert some["eval_tokens"] == 96
    generated = coterie(place, "generate", "export", "--prompt", "the small", "--max-new-tokens", 8)
    assert len(generated["token_ids"]) == 8
    done = subprocess.run(
        command("generate", "export", "--prompt", "the small", "--max-new-tokens", 8),
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == generated["text"] + "\n"


def test_a_student_is_distilled_with_the_kl_term_staged(place: Path):
    summary = coterie(
        place,
        "distill",
        "tiny.toml",
        *(
            "--set",
            "train.output_dir=student",
            "--set",
            "model.num_hidden_layers=2",
            "--set",
            "model.num_experts=[0, 6]",
        ),
        *("--set", "distill.teacher=run/model", "--set", "distill.drop_layers=[1]", "--set", "distill.stop_at=0.5"),
    )
    steps = [row for row in read_metrics(place / "student") if row["kind"] == "step"]
    assert all(row["kl_loss"] > 0 for row in steps[: STEPS // 2])
    assert all(row["kl_loss"] == 0 for row in steps[STEPS // 2 :])
    # It starts with its teacher's weights.
    assert steps[0]["loss"] < read_metrics(place / "run")[0]["loss"]
    assert coterie(place, "inspect", summary["model"])["config"]["num_hidden_layers"] == 2


def test_tensorboard_files_are_written_when_asked(place: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    coterie(place, "train", "tiny.toml", "--set", "train.output_dir=board", "--set", "train.tensorboard=true")
    events = EventAccumulator(str(place / "board"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    wanted = [(row["step"], row["loss"]) for row in read_metrics(place / "board") if row["kind"] == "step"]
    assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    assert "expert_balance/1" in events.Tags()["scalars"]
