"""`coterie bench memory`: what real ranks hold beside ZeRO's formula, and a thousand ranks on shapes alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from coterie.benchmarks import memory
from coterie.cli import main

TINY = """
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64
num_experts = [0, 4]
vocab_size = 100
[data]
path = "nowhere"
sequence_length = 16
[train]
output_dir = "runs/tiny"
tokens = 1024
batch_size = 8
learning_rate = 1e-3
"""


def answered(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["bench", "memory", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


def test_real_ranks_hold_what_the_formula_says(capsys: pytest.CaptureFixture[str]):
    found = answered(capsys, "--ranks", "1,4", "--dtype", "fp32,bf16")
    assert found["measured"] and found["within_tolerance"]
    assert len(found["results"]) == 2 * 2 * 3
    for result in found["results"]:
        assert abs(result["difference"]) <= 0.02
        assert result["difference"] == pytest.approx(result["bytes"]["total"] / result["formula"]["total"] - 1)
        for kind in ("weights", "masters", "moments"):
            assert result["bytes"][kind] == result["planned"][kind]
        # The plan's backward pass finishes parameters strictly in the reverse order of their list.
        assert result["bytes"]["gradients"] == pytest.approx(result["planned"]["gradients"], rel=0.02)
    assert {tuple(result["expert_parallel"]) for result in found["results"]} == {(1,) * 12, (4,) * 12}


def test_beyond_the_tolerance_is_code_1(capsys: pytest.CaptureFixture[str], tiny: str):
    # The vectors and the router of so small a model weigh, and its buckets are padded.
    found = answered(capsys, tiny, "--ranks", "4", "--dtype", "bf16", code=1)
    assert not found["within_tolerance"] and found["worst_difference"] > 0.02
    planned = answered(capsys, tiny, "--ranks", "4", "--dtype", "bf16", "--plan")
    assert not planned["measured"]
    assert [result["bytes"]["masters"] for result in planned["results"]] == [
        result["bytes"]["masters"] for result in found["results"]
    ]


def test_a_configuration_says_how_experts_are_spread(capsys: pytest.CaptureFixture[str], tiny: str):
    path = Path(tiny)
    path.write_text(path.read_text() + "[parallel]\nexpert_parallel = 2\n")
    for result in answered(capsys, tiny, "--ranks", "4", "--plan")["results"]:
        assert (result["dtype"], result["expert_parallel"]) == ("fp32", [2])
    assert main(["bench", "memory", tiny, "--ranks", "3"]) == 2
    assert capsys.readouterr().err == "coterie: parallel.expert_parallel: 2 does not divide the 3 ranks\n"


def test_a_thousand_ranks_are_counted_in_seconds(capsys: pytest.CaptureFixture[str]):
    for model, least, most in (("1t-moe", 1.03e12, 1.06e12), ("530b-dense", 5.29e11, 5.31e11)):
        start = time.monotonic()
        found = answered(capsys, "--model", model, "--ranks", "1024", "--zero-stage", "2")
        assert time.monotonic() - start < 10
        assert least < found["params_total"] < most
        (result,) = found["results"]
        assert 0 < result["least"]["total"] <= result["bytes"]["total"]
        for kind in ("weights", "masters", "moments"):  # gradients have whole matrices on their way
            assert result["bytes"][kind] == pytest.approx(result["formula"][kind], rel=0.01)


def test_the_formula_is_the_paper_s():
    model = memory.named("530b-dense").model
    params = memory._parameters(model)[0]
    for stage, expected in ((0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8)):
        held = memory.formula(model, "bf16", 8, stage, [])
        assert sum(held.values()) == pytest.approx(expected * params)
    # 128 experts on 128 ranks: one of each layer, which two ranks hold alike.
    moe = memory.named("1t-moe").model
    expert = 8 * 8192**2 + 5 * 8192
    shared = memory._parameters(moe)[0] - 15 * 128 * expert
    held = memory.formula(moe, "bf16", 256, 2, [128] * 15)
    assert sum(held.values()) == pytest.approx((2 + 14 / 256) * shared + (2 + 14 / 2) * 15 * expert)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "--model: no shape is called 'gpt'; known: 42m-moe, 530b-dense, 1t-moe"),
        (["--zero-stage", "3"], "--zero-stage: '3' is none of 0, 1, 2"),
        (["--ranks", "0"], "--ranks: '0' is no number from 1 up"),
        (["--ranks", "1000"], "--ranks: more than 64 are only counted, with --plan (1000)"),
        (["--dtype", "int8"], "--dtype: 'int8' is neither fp32 nor bf16"),
    ],
)
def test_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert main(["bench", "memory", *arguments]) == 2
    assert capsys.readouterr().err == f"coterie: {message}\n"


def test_prints_a_table(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "memory", "--model", "1t-moe", "--ranks", "1024"]) == 0
    out = capsys.readouterr().out
    assert "1.05T parameters" in out
    assert "49.3 GB" in out
