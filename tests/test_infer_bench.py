"""`coterie bench infer` and `dense-vs-moe`: the arithmetic of their figures, and all the way through at tiny sizes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coterie import _engine
from coterie.benchmarks import dense_vs_moe, infer, infer_contestants, worker
from coterie.benchmarks.memory import gpt
from coterie.cli import main

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"layers": 2, "hidden": 64, "heads": 4, "experts": 8, "top-k": 2, "ffn": 32, "vocabulary": 600}
SETTINGS = infer_contestants.Settings(prompt=16, generate=4, batches=(1, 2), threads=1, rounds=2)
FIGURES = {
    "first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "rss_bytes",
    "share_of_bandwidth",
    "read_gb_per_s",
}


def make_model(out: Path, **more: int) -> subprocess.CompletedProcess[str]:
    options = [f"--{name}={value}" for name, value in (SIZES | more).items()]
    command = [sys.executable, str(ROOT / "benches" / "make_model.py"), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("infer") / "olmoe"
    assert make_model(out).returncode == 0
    return out


@pytest.fixture(scope="module")
def measured(model: Path) -> dict[str, Any]:
    opened = infer_contestants.Model.open(model, None)
    field = {"bf16": infer_contestants.contestants(opened, "bf16", ["transformers"], SETTINGS)}
    return infer.run(opened, field, SETTINGS)


def test_a_made_model_is_the_same_for_the_same_seed_alone(model: Path, tmp_path: Path):
    def weights(path: Path) -> bytes:
        return b"".join(file.read_bytes() for file in sorted(path.glob("*.safetensors")))

    assert make_model(tmp_path / "again").returncode == 0
    assert make_model(tmp_path / "other", seed=1).returncode == 0
    assert weights(tmp_path / "again") == weights(model)
    assert weights(tmp_path / "other") != weights(model)


def test_a_made_model_keeps_the_size_of_what_it_multiplies(model: Path):
    weights = _engine.read_tensor(str(model), "lm_head.weight")  # 38400 normal numbers of variance 1 / 64
    assert np.mean(weights.astype(np.float64) ** 2) * 64 == pytest.approx(1, abs=5 * (2 / weights.size) ** 0.5)
    assert json.loads((model / "config.json").read_text())["architectures"] == ["OlmoeForCausalLM"]


def test_sizes_that_cannot_be_are_one_line(tmp_path: Path):
    made = make_model(tmp_path / "bad", **{"top-k": 9})
    assert made.returncode == 2 and made.stderr.endswith("--top-k: exceeds --experts 8 (9)\n")
    assert not (tmp_path / "bad").exists()


def test_every_system_runs_and_computes_the_same(measured: dict[str, Any]):
    (row,) = measured["rows"]
    for system in (row, row["peers"]["transformers"]):
        assert set(system) >= FIGURES
        assert set(system["decode_tokens_per_s"]) == {"1", "2"}
        for test in ("prefill", "1", "2"):
            rates, bandwidths = zip(*system["samples"][test], strict=True)
            assert len(rates) == SETTINGS.rounds * infer.PASSES  # such a model is quick
            assert statistics.median(bandwidths) == pytest.approx(1e9 * system["read_gb_per_s"][test])
        assert system["first_token_s"] > 0 and system["rss_bytes"] > 0 and system["share_of_bandwidth"] > 0
    # Prompts are few; greedy tokens of equal weights differ where two logits lie within the rounding of bf16.
    assert row["peers"]["transformers"]["same_first_token"] >= 0.5
    best = row["peers"]["transformers"]["prefill_tokens_per_s"]
    assert row["ratio_prefill"] == pytest.approx(row["prefill_tokens_per_s"] / best)
    for batch in row["decode_tokens_per_s"]:
        ours, theirs = (
            [rate for rate, _ in system["samples"][batch]] for system in (row, row["peers"]["transformers"])
        )
        assert min(ours) / max(theirs) <= row["ratio_decode"][batch] <= max(ours) / min(theirs)


def test_decoding_is_timed_while_all_sequences_run():
    together = [[1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 3.0, 4.0]]  # from 1.5 to 4.0: three tokens of each
    assert infer.decode_rate(together) == pytest.approx(6 / 2.5)
    one_by_one = [[1.0, 1.5, 2.0], [3.0, 3.5, 4.0]]
    assert infer.decode_rate(one_by_one) == pytest.approx(2.0)


def contestant(peer: str, variant: str, gigabytes: float, **rates: float) -> infer_contestants.Contestant:
    system = worker.System(peer, [])
    made = infer_contestants.Contestant(peer, variant, system, {}, None, bits=16, memory_bytes=gigabytes)
    made.rates = {test: [rate] for test, rate in rates.items()}
    made.bandwidths = dict.fromkeys(rates, [1e9])
    return made


def test_turns_are_compared_where_memory_was_alike():
    ours, fast, slow = (contestant(name, "", 1) for name in ("coterie", "a", "b"))
    ours.rates, ours.bandwidths = {"1": [30, 50, 32]}, {"1": [50e9, 80e9, 48e9]}
    fast.rates, fast.bandwidths = {"1": [25, 24, 23]}, {"1": [79e9, 80e9, 81e9]}
    slow.rates, slow.bandwidths = {"1": [20]}, {"1": [60e9]}
    assert infer.compared_turns(ours, fast, "1") == [50 / 25, 50 / 24, 50 / 23]
    assert infer.decode_ratio(ours, [fast], "1") == 50 / 24
    assert infer.compared_turns(ours, slow, "1") == []  # nowhere: then it is the medians'
    assert infer.decode_ratio(ours, [fast, slow], "1") == 32 / 20
    assert infer.decode_ratio(ours, [], "1") is None


def test_groups_hold_ours_and_what_fits_beside():
    ours, *others = (
        contestant(name, "", size) for name, size in (("coterie", 4), ("a", 4), ("b", 9), ("c", 30), ("d", 2))
    )
    names = [[one.peer for one in group] for group in infer.groups([ours, *others], 18)]
    assert names == [["coterie", "a", "b"], ["coterie", "d"], ["c"]]


def test_a_peer_is_taken_at_its_best_variant_of_each_test(model: Path):
    opened = infer_contestants.Model.open(model, None)
    row_of = [
        contestant("coterie", "", 1, **{"prefill": 100, "1": 30, "2": 60}),
        contestant("llama_cpp", "repacked", 1, **{"prefill": 50, "1": 20, "2": 30}),
        contestant("llama_cpp", "as it is", 1, **{"prefill": 80, "1": 10, "2": 20}),
        contestant("llama_cpp_q4_k_m", "", 1, **{"prefill": 400, "1": 40, "2": 20}),
    ]
    settings = infer_contestants.Settings(batches=(1, 2))
    row = infer.report(opened, "int4", row_of, settings)
    infer.add_prefill_ratios([row])
    assert row["peers"]["llama_cpp"]["best_variant"] == {"prefill": "as it is", "1": "repacked", "2": "repacked"}
    assert row["ratio_decode"] == {"1": 1.5, "2": 2.0}
    assert row["ratio_decode_any_type"] == {"1": 0.75, "2": 2.0}
    assert row["ratio_prefill"] == 0.25
    # 16 bits of a weight; keys and values, 4 heads of 16 in 2 layers, of 512 tokens and half of 128.
    read = 2 * opened.read_parameters + 2 * (512 + 64) * 2 * 2 * 64
    assert row["share_of_bandwidth"] == pytest.approx(read * 30 / 1e9)


def test_a_token_reads_its_experts_and_no_embedding(model: Path):
    opened = infer_contestants.Model.open(model, None)
    of_layer = 4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 32 + 4 * 64  # attention, router, two experts, norms
    assert opened.read_parameters == 2 * of_layer + 64 + 600 * 64


def test_models_of_equal_quality_are_compared(monkeypatch: pytest.MonkeyPatch):
    shapes = {
        "dense": lambda: gpt(2, 64, 4, dense_vs_moe.VOCABULARY, 64, []),
        "moe": lambda: gpt(2, 32, 2, dense_vs_moe.VOCABULARY, 64, [4], "sum"),
    }
    monkeypatch.setattr(dense_vs_moe, "SHAPES", shapes)
    settings = dense_vs_moe.Settings(prompt=4, generate=4, batches=(1, 2), threads=1, rounds=1)
    result = dense_vs_moe.run(dense_vs_moe.subjects(["dense", "moe"], "fp32"), settings)
    dense, moe = result["models"]
    assert dense["speedup"] == {"1": 1.0, "2": 1.0}
    assert moe["speedup"]["1"] == pytest.approx(dense["ms_per_token"]["1"] / moe["ms_per_token"]["1"])
    assert moe["ms_per_token"]["2"] == pytest.approx(2e3 / moe["tokens_per_s"]["2"])
    assert moe["parameters"] > moe["active_parameters"] and moe["rss_bytes"] > 0


def test_the_shapes_are_those_of_the_paper():
    sizes = {name: _engine.count_parameters(json.dumps(shape())) for name, shape in dense_vs_moe.SHAPES.items()}
    assert {name: round(total / 1e8) / 10 for name, (total, _) in sizes.items()} == {
        "dense-1.3b": 1.3,
        "350m-moe-128": 13.1,
        "350m-pr-moe-32-64": 4.1,
        "350m-pr-moe-mos": 3.5,
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.removeprefix("coterie: ").rstrip("\n")


def test_what_cannot_be_measured_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
):
    path = str(model)
    assert refused(capsys, "infer", path, "--dtype", "int3") == "--dtype: 'int3' is none of fp32, bf16, int8, int4"
    assert refused(capsys, "infer", path, "--batch", "0") == "--batch: '0' is no number from 1 up"
    assert refused(capsys, "infer", "/nowhere") == "/nowhere: no directory with a config.json"
    assert "no peer is called 'ollama'; known: llama_cpp, " in refused(capsys, "infer", path, "--peers", "ollama")
    monkeypatch.setitem(infer_contestants.PACKAGES, "transformers", "no_such_package")
    line = refused(capsys, "infer", path, "--peers", "transformers")
    assert line.endswith("has no no_such_package; run benches/peers/setup infer")
    assert "no shape is called '2b'; known: dense-1.3b, " in refused(capsys, "dense-vs-moe", "--models", "2b")


def test_the_command_prints_a_table_or_one_object(capsys: pytest.CaptureFixture[str], model: Path):
    arguments = ["bench", "infer", str(model), "--peers", "", "--rounds", "1", "--threads", "1", "--batch", "1"]
    arguments += ["--prompt", "8", "--generate", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "coterie" in out and "prefill" in out and "batch 1" in out
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    (row,) = json.loads(out)["rows"]
    assert row["ratio_decode"] == {"1": None} and row["peers"] == {}
