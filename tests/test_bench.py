"""`coterie bench`: the arithmetic of its figures, and the whole way through with real systems at tiny sizes."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.benchmarks import training
from coterie.benchmarks.cells import LayerCell, LinearCell, StepCell, TrainCell
from coterie.benchmarks.worker import OURS, BenchError, System
from coterie.cli import main

PEERS = Path(__file__).resolve().parents[1] / "benches" / "peers"
SETTINGS = training.Settings(threads=1, rounds=2, repeat=2, seconds=0.0)
TINY = LayerCell("fp32", tokens=64, hidden=32, ffn=64, experts=4, top_k=2, backward=True)


def samples(*times_ms: float, norm: float = 1.0, hit: float = 2.0) -> training.Samples:
    return training.Samples(list(times_ms), 1000, {"norms": {"output": norm}, "experts_hit": hit})


def test_useful_flops_count_two_matrices_and_three_passes():
    forward = replace(TINY, backward=False)
    assert forward.flops == 64 * 2 * 2 * (2 * 32 * 64)  # tokens, choices, matrices, multiply-adds
    assert TINY.flops == 3 * forward.flops
    assert LinearCell("fp32", 8, 32, 64, backward=True).flops == 3 * 2 * 8 * 32 * 64


def test_a_step_counts_what_a_token_meets():
    cell = StepCell(
        "fp32", tokens=64, hidden=32, ffn=64, experts=4, top_k=2, layers=3, heads=2, sequence=16, vocabulary=128
    )
    # Of three layers the second has experts: two dense MLPs and two experts, a router, attention and the output layer.
    matrices = 3 * 4 * 32 * 32 + 4 * 2 * 32 * 64 + 4 * 32 + 128 * 32
    attention = 3 * (2 * 2 * 32 * 16 / 2)  # scores and sums over half of the sequence
    assert cell.flops == 3 * 64 * (2 * matrices + attention)


def test_a_step_of_training_runs_in_every_system():
    cell = StepCell(
        "bf16", tokens=64, hidden=32, ffn=64, experts=4, top_k=1, layers=2, heads=2, sequence=16, vocabulary=128
    )
    contestants = training.systems("step", ["torch"])
    try:
        contestants = training.systems("step", ["torch", "deepspeed"])
    except BenchError:
        pass  # not installed here
    result = training.run([cell], contestants, SETTINGS)["cells"][0]
    for system in result["systems"].values():
        assert system["ms"] is not None, system["reason"]
        assert system["tokens_per_s"] == pytest.approx(64e3 / system["ms"])


def test_ranks_train_together_in_every_system():
    cells = [
        TrainCell(dtype, 64, 32, 48, experts=4, top_k=1, layers=2, heads=2, sequence=16, vocabulary=64, ranks=2)
        for dtype in ("fp32", "bf16")
    ]
    contestants = training.systems("train", ["ddp", "fsdp2"], ranks=2)
    for cell in training.run(cells, contestants, training.Settings(threads=1, rounds=1, repeat=1, seconds=0))["cells"]:
        assert set(cell["peers"]) == {"ddp", "fsdp2"}
        for name in ("coterie", "coterie_zero0", "coterie_one_rank", "ddp", "fsdp2"):
            system = cell["systems"][name]
            assert system["ms"] is not None, (name, system["reason"])
    with pytest.raises(BenchError, match=r"--ranks: does not divide --experts 4 \(3\)"):
        replace(cells[0], ranks=3, tokens=48).check()


def test_a_cell_is_held_against_its_limits_and_the_best_peer():
    cell = replace(TINY, backward=False)
    peak, bandwidth = cell.flops * 1e3, 1e9  # 1 ms of arithmetic
    read_ms = (2 * cell.expert_bytes + 4 * 4 * 32) / 1e6
    figures = {OURS: samples(9.0, 2.0, 4.0), "a": samples(8.0, 8.0), "b": samples(6.0, 3.0, 7.0, norm=1.25)}
    report = training.report(cell, figures, peak, bandwidth)
    assert (report["ours_ms"], report["systems"][OURS]["min_ms"]) == (4.0, 2.0)
    assert report["peers"] == {"a": 8.0, "b": 6.0}
    assert report["best_peer"] == "b"
    assert report["ratio_to_best_peer"] == 1.5
    assert report["ratio_of_minima"] == 1.5
    assert report["share_of_peak"] == pytest.approx(0.25)
    assert report["ours_gflops"] == pytest.approx(cell.flops / 4e6)
    assert report["share_of_bandwidth"] == pytest.approx(read_ms / 4)
    assert report["share_of_limit"] == pytest.approx(max(1, read_ms) / 4)
    assert report["systems"]["b"]["difference"] == pytest.approx(0.25)


def test_what_did_not_run_is_null_with_its_reason():
    figures = {OURS: samples(4.0), "a": training.Samples(reason="no memory"), "b": samples(2.0)}
    report = training.report(TINY, figures, 1e9, 1e9)
    assert report["peers"] == {"a": None, "b": 2.0}
    assert report["systems"]["a"] == {"ms": None, "reason": "no memory"}
    assert report["ratio_to_best_peer"] == 0.5
    figures[OURS] = training.Samples(reason="no memory")
    report = training.report(TINY, figures, 1e9, 1e9)
    assert report["ours_ms"] is None and report["ratio_to_best_peer"] is None


def test_the_summary_groups_by_every_axis_that_varies():
    def cell(dtype: str, experts: int, ratio: float | None) -> dict[str, Any]:
        return {"dtype": dtype, "experts": experts, "top_k": 1, "ratio_to_best_peer": ratio, "share_of_peak": 0.5}

    cells = [cell("fp32", 8, 2.0), cell("bf16", 8, 8.0), cell("bf16", 64, None)]
    groups = {group.pop("group"): group for group in training.summarize(cells)}
    assert list(groups) == ["all", "dtype=fp32", "dtype=bf16", "experts=8", "experts=64"]
    assert groups["all"]["cells"] == 3
    assert groups["all"]["ratio_to_best_peer_mean"] == pytest.approx(4.0)
    assert groups["all"]["ratio_to_best_peer_min"] == 2.0
    assert groups["dtype=bf16"]["ratio_to_best_peer_mean"] == pytest.approx(8.0)
    assert "ratio_to_best_peer_mean" not in groups["experts=64"]
    assert groups["experts=64"]["share_of_peak_mean"] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Ours and the peers that need nothing but the test environment. In the first cell, some experts have no tokens."""
    cells = [replace(TINY, tokens=8, experts=16), replace(TINY, dtype="bf16", backward=False)]
    return training.run(cells, training.systems("layer", ["torch_loop", "torch_grouped_mm", "transformers"]), SETTINGS)


def test_every_system_runs_every_cell(measured: dict[str, Any]):
    assert json.loads(json.dumps(measured)) == measured
    assert measured["machine"]["cpu"] and measured["machine"]["isa"]
    for cell in measured["cells"]:
        assert list(cell["systems"]) == [OURS, *cell["peers"]]
        for system in cell["systems"].values():
            assert system["steps"] >= SETTINGS.rounds * SETTINGS.repeat
            assert 0 < system["min_ms"] <= system["ms"]
            assert 0 < system["share_of_peak"] < 1
            assert system["peak_bytes"] > 0
        assert cell["ratio_to_best_peer"] == pytest.approx(min(cell["peers"].values()) / cell["ours_ms"])


def test_forward_passes_of_ours_run_with_packed_weights_and_without():
    assert [system.name for system in training.systems("layer", [])] == ["coterie"]
    cell = replace(TINY, dtype="bf16", backward=False)
    systems = training.run([cell], training.systems("layer", [], backward=False), SETTINGS)["cells"][0]["systems"]
    assert systems.keys() == {"coterie", "coterie_unpacked"}
    assert systems["coterie"]["packed_bytes"] > 0
    assert systems["coterie_unpacked"]["packed_bytes"] == 0


def test_every_system_computes_the_same(measured: dict[str, Any]):
    """A dot product of n terms is off by n roundings at most, and a step is three of them in a row (up, down,
    gradient). In bf16 its results are rounded as well: inner values, rows, weighted rows, their sum."""
    terms = TINY.hidden + 2 * TINY.ffn
    tolerance = {"fp32": terms * 2**-24, "bf16": 4 * 2**-9}
    for cell in measured["cells"]:
        for peer in cell["peers"]:
            assert cell["systems"][peer]["difference"] <= tolerance[cell["dtype"]], (peer, cell["dtype"])


def test_systems_that_do_not_fit_together_are_built_turn_by_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "memory_of_machine", lambda name: 0)
    cell = LinearCell("fp32", 8, 32, 64, backward=True)
    result = training.run([cell], training.systems("linear", ["torch"]), SETTINGS)["cells"][0]
    assert result["systems"]["torch"]["steps"] == SETTINGS.rounds * SETTINGS.repeat
    assert result["systems"]["torch"]["difference"] <= 64 * 2**-24


def test_a_peer_that_cannot_run_a_cell_does_not_stop_the_others():
    ours = training.systems("layer", [])
    ends = System("ends", [sys.executable, "-c", "import sys; sys.exit('no such processor')"])
    raises = System("raises", [sys.executable, str(PEERS / "torch_peer.py")])  # knows linear cells alone
    talks = System("talks", [sys.executable, "-c", "input(); print('hello')"])
    result = training.run([TINY], [*ours, ends, raises, talks], SETTINGS)["cells"][0]
    assert result["ours_ms"] > 0
    assert result["peers"] == {"ends": None, "raises": None, "talks": None}
    assert result["systems"]["ends"]["reason"] == "ended with code 1: no such processor"
    assert result["systems"]["raises"]["reason"] == "KeyError: 'layer'"
    assert result["systems"]["talks"]["reason"] == "said 'hello\\n' for an answer"


@pytest.mark.parametrize("top_k", [1, 2])
def test_deepspeed_drops_what_its_capacity_does_not_hold(top_k: int):
    try:
        contestants = training.systems("layer", ["deepspeed", "deepspeed+tcmalloc"])
    except BenchError as error:
        pytest.skip(str(error))
    result = training.run([replace(TINY, top_k=top_k)], contestants, SETTINGS)["cells"][0]
    for name in ("deepspeed", "deepspeed+tcmalloc"):
        system = result["systems"][name]
        assert system["ms"] is not None, system["reason"]
        assert system["version"] == "0.19.8"
        assert 0 <= system["dropped"] < 0.5
        # A squared norm falls by the share of rows that are left out, however large they were.
        if top_k == 1:
            assert system["difference"] < 1 - math.sqrt(0.5)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.removeprefix("coterie: ").rstrip("\n")


def test_what_cannot_be_measured_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert refused(capsys, "layer", "--experts", "8,x") == "--experts: 'x' is no number from 1 up"
    assert refused(capsys, "layer", "--tokens", "0") == "--tokens: '0' is no number from 1 up"
    assert refused(capsys, "layer", "--dtype", "fp16") == "--dtype: 'fp16' is neither fp32 nor bf16"
    assert refused(capsys, "layer", "--top-k", "9", "--experts", "8") == "--top-k: exceeds --experts 8 (9)"
    assert refused(capsys, "step", "--tokens", "100") == "--tokens: no multiple of --sequence 256 (100)"
    assert refused(capsys, "step", "--heads", "3") == "--heads: does not divide --hidden 256 (3)"
    assert "no peer is called 'tutel'; known: deepspeed, " in refused(capsys, "layer", "--peers", "tutel")
    assert "no peer is called 'torch+jemalloc'" in refused(capsys, "linear", "--peers", "torch+jemalloc")
    monkeypatch.setitem(training.PACKAGES, "deepspeed", "no_such_package")
    line = refused(capsys, "layer", "--peers", "deepspeed")
    assert line.startswith("--peers: deepspeed: ") and line.endswith("has no no_such_package; run benches/peers/setup")


def test_the_command_prints_a_table_or_one_object(capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "linear", "--tokens", "8", "--hidden", "32", "--outputs", "64", "--dtype", "fp32"]
    arguments += ["--rounds", "1", "--repeat", "1", "--threads", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "fp32 T 8" in out and "coterie" in out and "torch" in out and "times as fast as the best peer" in out
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)["cells"][0]["tokens"] == 8
