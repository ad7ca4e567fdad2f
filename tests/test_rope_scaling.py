"""Stretched rotary positions against transformers, within the original context and beyond it."""

import json
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from coterie import LLM, SamplingParams, _engine

TOLERANCE = 1e-4  # as in test_parity.py
CONTEXT = 64  # before the stretch

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.6, 2.0, 2.2],
    "long_factor": [1.2, 1.9, 2.7, 3.3, 4.1, 5.0, 6.5],
    "original_max_position_embeddings": CONTEXT,
}

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
    "longrope": LONGROPE,
    "longrope_factor": {**LONGROPE, "factor": 2.0},
    "longrope_attention_factor": {**LONGROPE, "attention_factor": 1.3},
    "phimoe": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.2, 2.0, 3.3, 6.5],
        "short_mscale": 1.1,
        "long_mscale": 1.25,
        "original_max_position_embeddings": CONTEXT,
    },
}


def phimoe(rope: dict[str, object], **changes: object) -> PreTrainedModel:
    """Phi-MoE with these rope_parameters.

    In long sequences transformers 5 chooses the long factors, and then turns by the short ones all the same. The
    models' own code and transformers 4 turn by the long ones, and so does this model: by what was chosen.
    """
    model = tiny_models.changed("phimoe", rope_parameters=rope, **changes)
    rotary = model.model.rotary_emb
    rotary.rope_init_fn = lambda config: (rotary.inv_freq, rotary.attention_scaling)
    return model


def build(name: str) -> PreTrainedModel:
    """A fresh model: transformers keeps the base of the longest sequence that a "dynamic" model has met."""
    rope = {"rope_theta": 300.0, **SCALINGS[name]}
    if name == "phimoe":
        return phimoe(rope)
    # Files of these say the context after the stretch.
    positions = 5 * CONTEXT if name == "llama3" or name.startswith("longrope") else CONTEXT
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
    """Out of the original context, and from beyond it on; keys stay as they came into the cache.

    Those of longrope don't: who outgrows the original context is computed anew. So does transformers with Phi's models;
    with others it does without a cache.
    """
    prompt = tiny_models.prompt(length, seed=length)
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "use_cache": not name.startswith("longrope")}
    generated = build(name).generate(ids, max_new_tokens=60, do_sample=False, **options)
    output = LLM(directory, threads=2).generate([prompt], SamplingParams(max_tokens=60))[0]
    assert output.outputs[0].token_ids == generated[0, length:].tolist()


def test_published_phimoe(tmp_path: Path) -> None:
    """As the files of Phi-3.5-MoE have it; what is written from them opens in transformers."""
    model = build("phimoe")
    directory = tiny_models.save(model, tmp_path / "published")
    prompt = tiny_models.prompt(100, seed=2)
    expected = LLM(directory, threads=2).logits(prompt)

    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config |= {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(config))
    assert (LLM(directory, threads=2).logits(prompt) == expected).all()

    assert _engine.export_model(str(directory), str(tmp_path / "ours"), "CoterieForCausalLM") == "CoterieForCausalLM"
    assert _engine.export_model(str(tmp_path / "ours"), str(tmp_path / "back")) == "PhimoeForCausalLM"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert {**opened.config.rope_parameters, "factor": None} == {**model.config.rope_parameters, "factor": None}
    assert (LLM(tmp_path / "back", threads=2).logits(prompt) == expected).all()


@torch.no_grad()
def test_phimoe_of_a_gguf_file(tmp_path: Path) -> None:
    """Its factors are tensors, and it has one attention factor for all lengths."""
    mscales = {"short_mscale": 1.2, "long_mscale": 1.2}
    rope = {"rope_theta": 300.0, **SCALINGS["phimoe"], **mscales}

    def model() -> PreTrainedModel:
        return phimoe(rope, router_jitter_noise=0.01)  # files don't say it

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_orig_ctx_len(CONTEXT)
        writer.add_rope_scaling_attn_factors(mscales["long_mscale"])
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))

    file = gguf_files.write_model(tmp_path / "model.gguf", "phimoe", model(), add=add)
    for length in (CONTEXT, CONTEXT + 1, 200):
        token_ids = tiny_models.prompt(length, seed=length)
        expected = model()(torch.tensor([token_ids])).logits[0].numpy()
        actual = LLM(file, dtype="fp32", threads=2).logits(token_ids)
        assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()
