"""gpt-oss with its experts in MXFP4, as its checkpoints have them, against transformers on the decoded weights."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from gguf import GGMLQuantizationType
from gguf_files import Encoded, as_fp32, write_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from coterie import CorruptFile, _engine

TOLERANCE = 1e-4  # as in test_parity.py
EXPERTS, HIDDEN, INNER = 5, 64, 96


def random_blocks(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes [E, rows, columns / 32, 16] and scales [E, rows, columns / 32] around 2^-3."""
    codes = torch.randint(256, (EXPERTS, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (EXPERTS, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return codes, scales


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    config = transformers.GptOssConfig(
        vocab_size=tiny_models.VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=19,
        max_position_embeddings=tiny_models.MAX_LENGTH,
        initializer_range=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )
    model = tiny_models.seeded(lambda: transformers.GptOssForCausalLM(config), seed=0)
    directory = tiny_models.save(model, tmp_path_factory.mktemp("mxfp4"))
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            codes, scales = random_blocks(rows, columns, generator)
            getattr(experts, name).data = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
            key = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[key]
            tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = codes, scales
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config_json = json.loads(path.read_text())
    path.write_text(json.dumps({**config_json, "quantization_config": {"quant_method": "mxfp4"}}))
    return model, directory


@torch.no_grad()
def test_logits(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    model, directory = checkpoint
    token_ids = tiny_models.prompt(60, seed=60)
    expected = model(torch.tensor([token_ids])).logits[0].numpy()
    actual = _engine.Engine(str(directory), dtype="fp32").logits(token_ids)
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


def test_shapes_that_do_not_fit_are_refused(checkpoint: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, directory = checkpoint
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    key = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[key] = tensors[key][:, :-1].contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(CorruptFile, match=r"down_proj_blocks.*is not U8 \[..., K / 32, 16\] beside"):
        _engine.Engine(str(tmp_path))


def packed_bytes(model: Path, name: str) -> int:
    """Of a block in the only file of packed weights beside a model; its index stands before its last 16 bytes."""
    [file] = model.glob("*.coterie")
    content = file.read_bytes()
    file.unlink()
    size = int.from_bytes(content[-16:-8], "little")
    blocks = json.loads(content[-16 - size : -16])["blocks"]
    return next(block for block in map(list, blocks) if name in block)[2]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_experts_stay_in_four_bits(checkpoint: tuple[PreTrainedModel, Path], tmp_path: Path, dtype: str) -> None:
    model, directory = checkpoint
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    token_ids = tiny_models.prompt(60, seed=60)
    actual = _engine.Engine(str(copy), dtype=dtype, mmap=True).logits(token_ids)
    # Rows of 64 codes in 4 bits, with two scales in bf16.
    assert packed_bytes(copy, "model.layers.0.experts.up.weight.0") == 2 * INNER * (HIDDEN // 2 + 2 * HIDDEN // 32)

    # Experts are exact; what they are given is rounded to 8 bits, which errs by 0.55 % at each product and dominates
    # what int8 and bf16 do elsewhere (test_quantize.py): 14 products of the two layers, of which none makes errors
    # larger by more than the logits' own size.
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0].numpy()
    error = np.median(np.sqrt(((actual - expected) ** 2).mean(-1))) / expected.std()
    assert error < 14 * 0.0055

    if dtype == "int8":
        quantized = tmp_path / "quantized"
        _engine.quantize_model(str(directory), str(quantized), dtype, "", "", 1, lambda done, total: None)
        stored = {tensor["name"]: tensor for tensor in _engine.stored_tensors(str(quantized))}
        blocks = stored["model.layers.0.experts.up.weight_blocks"]
        assert blocks["shape"] == [EXPERTS, 2 * INNER, HIDDEN // 32, 16]
        assert np.array_equal(_engine.Engine(str(quantized)).logits(token_ids), actual)


def with_mxfp4_experts(stored: str, values: np.ndarray) -> Encoded:
    """The experts' weights, which are numbers of MXFP4, in that type."""
    if not stored.endswith("_exps.weight"):
        return as_fp32(stored, values)
    kind = GGMLQuantizationType.MXFP4
    data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    assert np.array_equal(gguf.quants.dequantize(data, kind), values)
    return data, kind


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_gguf_file_is_the_same_model(checkpoint: tuple[PreTrainedModel, Path], tmp_path: Path, dtype: str) -> None:
    """Gates and ups lie apart there; what they are multiplied as is the same, bit for bit."""
    model, directory = checkpoint
    file = write_model(tmp_path / "model.gguf", "gpt-oss", model, with_mxfp4_experts)
    token_ids = tiny_models.prompt(60, seed=60)
    expected = _engine.Engine(str(directory), dtype=dtype).logits(token_ids)
    assert np.array_equal(_engine.Engine(str(file), dtype=dtype).logits(token_ids), expected)

    if dtype.startswith("int"):
        quantized = tmp_path / "quantized"
        _engine.quantize_model(str(file), str(quantized), dtype, "", "", 1, lambda done, total: None)
        stored = {tensor["name"]: tensor for tensor in _engine.stored_tensors(str(quantized))}
        blocks = stored["model.layers.0.experts.up.weight_blocks"]
        assert blocks["shape"] == [EXPERTS, 2 * INNER, HIDDEN // 32, 16]
        assert np.array_equal(_engine.Engine(str(quantized)).logits(token_ids), expected)
