"""Weights in few bits: what they do to a model's predictions, and the file that keeps them packed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny_models

from coterie import LLM, CorruptFile, _engine

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


def test_mapped_weights_need_a_directory_that_can_be_written(model: Path) -> None:
    model.chmod(0o555)
    # Root writes anywhere, unless it runs without that right.
    without_rights = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    with pytest.raises(subprocess.CalledProcessError) as failed:
        logits_and_log(model, without_rights, dtype="int8", mmap=True)
    assert "packed weights belong into this file, which cannot be written" in failed.value.stderr


def test_packed_weights_of_many_models_in_a_directory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Beside a model that cannot be written to; of two models of one name, both."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other, cache = elsewhere / model.name, elsewhere / "made" / "cache"
    tiny_models.save(tiny_models.seeded(tiny_models.llama, seed=6), other)
    model.chmod(0o555)
    options = {"dtype": "int8", "weight_cache_dir": str(cache), "mmap": True}
    for path in (model, other):
        expected = logits(path, dtype="int8")
        assert np.array_equal(logits(path, **options), expected)
        again, log = logits_and_log(path, **options)
        assert np.array_equal(again, expected)
        assert "packing" not in log
        assert not packed_files(path)
    assert len(list(cache.iterdir())) == 2
    assert all(file.name.startswith(f"{model.name}-") for file in cache.iterdir())


def test_the_directory_of_packed_weights_can_be_named(smollm2: Path, tmp_path: Path) -> None:
    generate = ("generate", smollm2, "--prompt", "a", "--max-new-tokens", 2, "--dtype", "int4", "--cache-dir")
    done = coterie(*generate, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "file").write_text("")
    for mmap in ((), ("--mmap",)):
        done = coterie(*generate, tmp_path / "file", *mmap)
        assert (done.returncode, done.stdout) == (2, "")
        [line] = done.stderr.splitlines()
        assert line.startswith(f"coterie: {tmp_path}/file/")


def test_no_file_where_none_is_wanted(model: Path) -> None:
    logits(model, dtype="int8", weight_cache=False)
    assert not packed_files(model)
    with pytest.raises(ValueError, match="mmap"):
        logits(model, dtype="int8", weight_cache=False, mmap=True)
    with pytest.raises(ValueError, match="weight_cache_dir"):
        logits(model, dtype="int8", weight_cache=False, weight_cache_dir="somewhere")


def coterie(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "coterie"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def quantize(model: Path, out: Path, dtype: str, attention_dtype: str = "", head_dtype: str = "") -> Path:
    """What `coterie quantize` does but for the tokenizer."""
    done: list[tuple[int, int]] = []
    _engine.quantize_model(
        str(model), str(out), dtype, attention_dtype, head_dtype, 1, lambda *progress: done.append(progress)
    )
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]
    return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models that differ in what can be quantized, of fp32 weights."""
    return {name: tiny_models.save(tiny_models.build(name), tmp_path_factory.mktemp(name)) for name in QUANTIZED_MODELS}


# Tied and untied heads, biases, transposed files, experts with and without company, latent attention, all routers.
QUANTIZED_MODELS = (
    "llama",
    "gpt2",
    "olmoe",
    "coterie_pyramid",
    "deepseek_v2",
    "gpt_oss",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granite_moe",
    "phimoe",
    "glm4_moe",
    "deepseek_v3",
)


@pytest.mark.parametrize("name", QUANTIZED_MODELS)
@pytest.mark.parametrize(
    "options",
    [{"dtype": "int8"}, {"dtype": "int4"}, {"dtype": "int4_64", "attention_dtype": "int8", "head_dtype": "bf16"}],
    ids=lambda options: "-".join(options.values()),
)
def test_a_quantized_model_is_what_quantizing_on_load_gives(
    sources: dict[str, Path], tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    out = quantize(sources[name], tmp_path / "out", **options)
    expected = logits(sources[name], **options)
    assert np.array_equal(logits(out), expected), "dtype auto"
    assert np.array_equal(logits(out, **options), expected)


def rounded_to_int8(weights: np.ndarray) -> np.ndarray:
    """Each group of 64 of a row to multiples of a 127th of its largest magnitude, that in bf16, rounded up."""
    result = np.empty_like(weights)
    for start in range(0, weights.shape[-1], 64):
        group = weights[..., start : start + 64]
        step = np.abs(group).max(-1, keepdims=True) / np.float32(127)
        upwards = (step.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
        step = upwards.view(np.float32)
        result[..., start : start + 64] = np.rint(group / step) * step
    return result


def is_matrix(name: str) -> bool:
    """Whether a logical tensor is quantized: all matrices but routers and kv_b_proj, which is quantized on load."""
    projections = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.", "_a_proj.", ".q_b_proj.")
    kinds = (*projections, "mlp.", "experts.", "lm_head.", "embed_tokens.")
    return name.endswith(".weight") and any(kind in name for kind in kinds)


@pytest.mark.parametrize("name", QUANTIZED_MODELS)
@pytest.mark.parametrize("dtype", ["int8", "int4", "int4_64"])
def test_what_is_stored_is_near_the_weights(sources: dict[str, Path], tmp_path: Path, name: str, dtype: str) -> None:
    weights = _engine.load_weights(str(sources[name]))
    stored = _engine.load_weights(str(quantize(sources[name], tmp_path / "out", dtype)))
    assert stored.keys() == weights.keys()
    for key, original in weights.items():
        if not is_matrix(key):
            assert np.array_equal(stored[key], original), key
        elif dtype == "int8":
            # A quotient that lies next to a half may go either way: one step, of few elements.
            step = np.abs(original).max() / 126
            differs = stored[key] != rounded_to_int8(original)
            assert differs.mean() < 1e-3, key
            assert np.abs(stored[key] - original).max() <= 1.01 * step, key
        else:
            # No worse in the mean than 16 steps between the extremes of each group. Step and minimum are multiples of
            # a row's unit and of 16 of them, codes of 8 bits: an element is off by 15 and by 16 halves of it more.
            size = 32 if dtype == "int4" else 64
            groups = [slice(start, start + size) for start in range(0, original.shape[-1], size)]
            lows = np.stack([original[..., group].min(-1) for group in groups], -1)
            steps = (np.stack([original[..., group].max(-1) for group in groups], -1) - lows) / 15
            unit = np.maximum(steps / 255, np.abs(lows) / (127 * 16)).max(-1)
            for i, where in enumerate(groups):
                group, got = original[..., where], stored[key][..., where]
                low, step = lows[..., i : i + 1], steps[..., i : i + 1]
                plain = low + np.rint((group - low) / np.where(step == 0, 1, step)) * step
                slack = group.shape[-1] * (31 / 2 * unit) ** 2
                error, limit = ((group - got) ** 2).sum(-1), ((group - plain) ** 2).sum(-1)
                assert (error <= 1.1 * limit + slack).all(), key


def dequantized(quantized: Path, out: Path) -> Path:
    """The model with the rounded weights as plain numbers in fp32."""
    out.mkdir()
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(_engine.load_weights(str(quantized)), out / "model.safetensors", {"format": "pt"})
    return out


def typical_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of a token's logits, of the median token: a few tokens may go to other experts."""
    return float(np.median(np.sqrt(((actual - expected) ** 2).mean(-1))))


# What is left are activations, rounded once per product. To 8 bits: a group of 64 normal numbers has its largest near
# 2.4 standard deviations, so that the error's is 2.4 / 127 / sqrt(12) = 0.55 %. In bf16, activations and weights err by
# 2^-8 / sqrt(12) / 1.4 = 0.08 % each (the mantissa is 1.4 in the mean), 0.11 % together. Errors at the same places grow
# alike on their way to the logits: to first order, those of int8 are 5 times those of bf16.
INT8_OVER_BF16 = 5.0


@pytest.mark.parametrize("name", QUANTIZED_MODELS)
@pytest.mark.parametrize("dtype", ["int8", "int4", "int4_64"])
def test_logits_are_those_of_the_rounded_weights(
    sources: dict[str, Path], tmp_path: Path, name: str, dtype: str
) -> None:
    # kv_b_proj of latent attention is rounded on load, so that its dequantized weights are in no file.
    quantized = quantize(sources[name], tmp_path / "quantized", dtype, "int8" if name.startswith("deepseek") else "")
    plain = dequantized(quantized, tmp_path / "plain")
    exact = logits(plain, dtype="fp32")
    assert np.array_equal(logits(quantized, dtype="fp32"), exact)
    error, of_bf16 = typical_error(logits(quantized), exact), typical_error(logits(plain, dtype="bf16"), exact)
    assert error < INT8_OVER_BF16 * of_bf16
    if dtype != "int8":
        assert typical_error(logits(quantized), logits(sources[name], dtype="fp32")) > 3 * error, "too weak a test"


def test_command(smollm2: Path, tmp_path: Path) -> None:
    """A GGUF file becomes a directory that every command opens, tokenizer and all."""
    out = tmp_path / "out"
    done = coterie("quantize", smollm2.parent, out, "--dtype", "int4", "--attention-dtype", "int8", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["bytes"] == sum(tensor["bytes"] for tensor in _engine.stored_tensors(str(out)))
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {
        "quant_method": "coterie",
        "dtype": "int4",
        "attention_dtype": "int8",
        "head_dtype": "int8a16",
    }
    answers = [
        coterie("generate", model, "--chat", "--prompt", "What is 2+2?", "--max-new-tokens", 8, "--json", *options)
        for model, options in ((out, ()), (smollm2, ("--dtype", "int4", "--attention-dtype", "int8", "--no-cache")))
    ]
    assert all(answer.returncode == 0 for answer in answers), answers
    assert json.loads(answers[0].stdout)["token_ids"] == json.loads(answers[1].stdout)["token_ids"]
    assert json.loads(coterie("inspect", out, "--json").stdout)["bytes"] == facts["bytes"]

    assert coterie("inspect", smollm2.parent, "--json").stdout == coterie("inspect", smollm2, "--json").stdout
    exported = coterie("export", smollm2.parent, tmp_path / "of the file", "--json")
    assert json.loads(exported.stdout)["architecture"] == "LlamaForCausalLM"
    exported = coterie("export", out, tmp_path / "exported", "--json")
    assert json.loads(exported.stdout)["architecture"] == "LlamaForCausalLM"
    again = coterie("quantize", smollm2, out, "--dtype", "int8")
    assert (again.returncode, again.stdout) == (2, "")
    assert "holds a model already" in again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method: 'gptq' is not supported"),
        ({"dtype": "int5"}, "quantization_config.dtype: 'int5' is not one of"),
        ({"dtype": "bf16"}, "_codes: a tensor that config.json's quantization_config keeps in bf16"),
        ({"dtype": "int4"}, "_codes: is not U8 with rows of"),
    ],
)
def test_a_wrong_quantization_is_named(llama: Path, tmp_path: Path, change: dict[str, str], message: str) -> None:
    out = quantize(llama, tmp_path / "out", "int8")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].update(change)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, CorruptFile), match=re.escape(message)):
        LLM(out)


def test_only_small_types_are_written(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype: 'bf16' is not one of int8, int4, int4_64"):
        quantize(llama, tmp_path / "out", "bf16")
