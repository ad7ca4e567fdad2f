"""Stretched rotary positions against transformers, within the original context and beyond it."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from transformers import PreTrainedModel

from coterie import LLM, SamplingParams

TOLERANCE = 1e-4  # as in test_parity.py
CONTEXT = 64  # before the stretch

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "yarn_not_truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "truncate": False,
        "attention_factor": 1.3,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
}


def build(name: str) -> PreTrainedModel:
    """A fresh model: transformers keeps the base of the longest sequence that a "dynamic" model has met."""
    # llama3 files say the context after the stretch.
    positions = 5 * CONTEXT if name == "llama3" else CONTEXT
    rope = {"rope_theta": 300.0, **SCALINGS[name]}
    return tiny_models.seeded(lambda: tiny_models.llama_scaled(rope, max_position_embeddings=positions), seed=1)


@pytest.fixture(scope="module", params=list(SCALINGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(build(name), tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 200])
@torch.no_grad()
def test_logits(name: str, directory: Path, length: int) -> None:
    token_ids = tiny_models.prompt(length, seed=length)
    expected = build(name)(torch.tensor([token_ids])).logits[0].numpy()
    actual = LLM(directory, threads=2).logits(token_ids)
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("length", [30, 100])
def test_continuation_is_that_of_generate(name: str, directory: Path, length: int) -> None:
    """Out of the original context, and from beyond it on; keys stay as they came into the cache."""
    prompt = tiny_models.prompt(length, seed=length)
    ids = torch.tensor([prompt])
    generated = build(name).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    output = LLM(directory, threads=2).generate([prompt], SamplingParams(max_tokens=60))[0]
    assert output.outputs[0].token_ids == generated[0, length:].tolist()
