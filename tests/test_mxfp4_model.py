"""gpt-oss with its experts in MXFP4, as its checkpoints have them, against transformers on the decoded weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
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
    actual = _engine.Engine(str(directory)).logits(token_ids)
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
