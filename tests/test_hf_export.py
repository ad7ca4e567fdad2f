"""Exported models open in transformers with equal logits, whatever they came from."""

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import coterie.torch  # noqa: F401  (registers CoterieForCausalLM)
from coterie import InvalidArgument, _engine
from coterie.torch import CoterieForCausalLM

HUGGING_FACE = [name for name in tiny_models.BUILDERS if not name.startswith("coterie")]
# Those of which coterie.torch lacks something, and what it says.
NOT_TRAINED = {
    "mistral": r"layers\[0\].*window",
    "qwen2": r"layers\[2\].*window",
    "granite_moe": r"embedding_multiplier \(1.7\) is not trained",
    "phimoe": r"lm_head_bias \(True\) is not trained",
    "glm4_moe": r"rotary_dim \(6\) is not trained",
    "gpt_oss": r"rope_scaling .* is not trained",
    "deepseek_v2": r"rope_interleaved \(True\) is not trained",
    "deepseek_v2_greedy": r"rope_scaling .* is not trained",
    "deepseek_v3": r"rope_scaling .* is not trained",
    "deepseek_v3_half_split": r"latent_attention .* is not trained",
}
TOLERANCE = 1e-5  # of the largest logit: the same fp32 weights, perhaps another order of sums


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor([tiny_models.prompt(40, seed=40)])).logits


def open_model(directory: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), f"keys that do not fit: {info}"
    return model.eval()


def assert_equal_logits(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    expected = logits(reference)
    assert (logits(model) - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_to_our_format_and_back(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    source = tiny_models.save(model, tmp_path / "source")
    ours, back = tmp_path / "ours", tmp_path / "back"

    assert _engine.export_model(str(source), str(ours), "CoterieForCausalLM") == "CoterieForCausalLM"
    if name in NOT_TRAINED:
        with pytest.raises(ValueError, match=NOT_TRAINED[name]):
            open_model(ours)
    else:
        opened = open_model(ours)
        assert type(opened) is CoterieForCausalLM
        assert_equal_logits(opened, model)
    prompt = tiny_models.prompt(40, seed=40)
    assert (_engine.Engine(str(ours)).logits(prompt) == _engine.Engine(str(source)).logits(prompt)).all()

    assert _engine.export_model(str(ours), str(back)) == type(model).__name__
    opened = open_model(back)
    assert type(opened) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["coterie_pyramid", "coterie_gpt_style"])
def test_pr_moe_stays_in_our_format(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    source = tiny_models.save(model, tmp_path / "source")
    assert _engine.export_model(str(source), str(tmp_path / "out")) == "CoterieForCausalLM"
    opened = open_model(tmp_path / "out")
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key
    assert_equal_logits(opened, model)
    with pytest.raises(InvalidArgument, match="MixtralForCausalLM"):
        _engine.export_model(str(source), str(tmp_path / "mixtral"), "MixtralForCausalLM")


@pytest.mark.parametrize("name", ["mixtral", "coterie_pyramid"])
def test_loaded_weights_are_the_logical_tensors(name: str, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build(name), tmp_path / "source")
    ours = tmp_path / "ours"
    _engine.export_model(str(source), str(ours), "CoterieForCausalLM")
    expected = dict(open_model(ours).named_parameters())
    weights = _engine.load_weights(str(source))
    assert set(weights) == set(expected)
    for key, value in weights.items():
        assert (torch.from_numpy(value) == expected[key]).all(), key
