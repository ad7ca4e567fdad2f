"""Weights in few bits: what they do to a model's predictions, and the file that keeps them packed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from coterie import LLM

PROMPT = tiny_models.prompt(40)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, which nobody may change."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """The same, for one test."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def packed_files(model: Path) -> list[Path]:
    """The files of packed weights beside a model."""
    return sorted(model.glob("*.coterie"))


def logits(model: Path, **options: object) -> np.ndarray:
    """Of PROMPT, with fp32 keys and values, so that they differ by the weights' type alone."""
    return LLM(model, kv_cache_dtype="fp32", threads=1, **options).logits(PROMPT)


def logits_and_log(model: Path, launcher: Sequence[str] = (), **options: object) -> tuple[np.ndarray, str]:
    """The same from a new process, and what it logs."""
    code = (
        "import sys, json, numpy; from coterie import LLM; model, prompt, options = json.loads(sys.argv[1]);"
        "sys.stdout.write(LLM(model, kv_cache_dtype='fp32', threads=1, **options).logits(prompt).tobytes().hex())"
    )
    done = subprocess.run(
        [*launcher, sys.executable, "-c", code, json.dumps([str(model), PROMPT, options])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COTERIE_LOG": "1"},
    )
    values = np.frombuffer(bytes.fromhex(done.stdout), np.float32)
    return values.reshape(len(PROMPT), -1), done.stderr


# mmap asks for the file that small models do without.
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_packed_weights_are_kept_and_give_the_same_bits(model: Path, dtype: str) -> None:
    expected = logits(model, dtype=dtype)
    assert not packed_files(model), "a small model needs no file"
    first, log = logits_and_log(model, dtype=dtype, mmap=True)
    [file] = packed_files(model)
    assert f"packing into {file}" in log
    before = file.stat()
    second, log = logits_and_log(model, dtype=dtype, mmap=True)
    assert f"weights: from {file}" in log
    assert "packing" not in log
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)


def test_types_have_files_of_their_own(model: Path) -> None:
    for options in ({"dtype": "int8"}, {"dtype": "int4"}, {"dtype": "int4", "attention_dtype": "int8"}):
        logits(model, mmap=True, **options)
    assert len(packed_files(model)) == 3


def test_a_changed_model_is_packed_anew(model: Path) -> None:
    logits(model, dtype="int8", mmap=True)
    tiny_models.save(tiny_models.seeded(tiny_models.llama, seed=6), model)
    changed, log = logits_and_log(model, dtype="int8", mmap=True)
    assert "packing" in log
    [file] = packed_files(model)
    assert np.array_equal(changed, logits(model, dtype="int8"))


@pytest.mark.parametrize("place", ["index", "cut", "start"])
def test_a_damaged_file_is_made_anew(model: Path, place: str) -> None:
    expected = logits(model, dtype="int8", mmap=True)
    [file] = packed_files(model)
    content = bytearray(file.read_bytes())
    if place == "cut":
        del content[-100:]
    else:
        content[-40 if place == "index" else 2] ^= 1
    file.write_bytes(content)
    again, log = logits_and_log(model, dtype="int8", mmap=True)
    assert "packing" in log
    assert np.array_equal(again, expected)


def test_a_directory_that_cannot_be_written_is_no_obstacle(model: Path) -> None:
    expected = logits(model, dtype="int8")
    model.chmod(0o555)
    # Root writes anywhere, unless it runs without that right.
    without_rights = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    got, log = logits_and_log(model, without_rights, dtype="int8", mmap=True)
    assert "not kept" in log
    assert not packed_files(model)
    assert np.array_equal(got, expected)


def test_no_file_where_none_is_wanted(model: Path) -> None:
    logits(model, dtype="int8", weight_cache=False)
    assert not packed_files(model)
    with pytest.raises(ValueError, match="mmap"):
        logits(model, dtype="int8", weight_cache=False, mmap=True)
