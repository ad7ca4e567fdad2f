"""The configuration file: defaults, overrides, and the exact words of every refusal."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from coterie import config as configuration
from coterie.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent

TEXT = """
[model]
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 128
num_experts = [0, 4]
top_k = 3
residual = "sum"

[model.router]
normalize = true

[data]
path = "DATA"
sequence_length = 32

[train]
output_dir = "runs/tiny"
tokens = 4096
batch_size = 4
learning_rate = 1e-3
warmup_tokens = 512
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "meta.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": 7}))
    file = tmp_path / "tiny.toml"
    file.write_text(TEXT.replace("DATA", str(data)))
    return file


def test_resolves_to_the_models_config_and_the_trainers_settings(path: Path):
    resolved = configuration.load(path).resolve()
    router = {
        "score_function": "softmax",
        "chooser": "tokens",
        "num_groups": 1,
        "top_k_groups": 1,
        "group_score": "max",
        "choice_bias": False,
        "normalize": True,
        "normalize_over": "chosen",
        "routed_scaling": 1.0,
        "choice_noise": "none",
        "jitter": 0.0,
        "capacity_factor": 0.0,
        "eval_capacity_factor": 0.0,
        "min_capacity": 4,
        "drop_policy": "random",
    }
    moe_layer = {
        "num_experts": 4,
        "top_k": 3,
        "expert_intermediate_size": 128,
        "intermediate_size": 128,
        "residual": "sum",
        "router": router,
    }
    assert resolved.model["layers"] == [{"num_experts": 0, "intermediate_size": 128}, moe_layer]
    # What the file leaves out: from the data, or from other keys.
    wanted = {
        "architectures": ["CoterieForCausalLM"],
        "model_type": "coterie",
        "vocab_size": 300,
        "eos_token_id": 7,
        "head_dim": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    assert {key: resolved.model[key] for key in wanted} == wanted
    assert resolved.settings["distill"] is None
    assert resolved.settings["train"]["min_learning_rate"] == pytest.approx(1e-4)
    assert resolved.settings["train"]["decay_tokens"] == 4096


def test_a_layer_without_residual_has_no_fixed_mlp(path: Path):
    model = configuration.load(path, ["model.residual=none", "model.expert_intermediate_size=[8, 16]"]).resolve().model
    assert model["layers"][1]["expert_intermediate_size"] == 16
    assert "intermediate_size" not in model["layers"][1]


def test_overrides_are_toml_or_bare_text_and_the_last_one_wins(path: Path):
    overrides = [
        "train.tokens=8192",
        "train.output_dir=runs/a b",
        'train.dtype="bf16"',
        "model.router.capacity_factor=2",
        "train.tokens=16_384",
    ]
    config = configuration.load(path, overrides)
    assert config.train.tokens == 16384
    assert config.train.output_dir == "runs/a b"
    assert config.train.dtype == "bf16"
    assert config.model.router.capacity_factor == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.tokns=1", "train.tokns: unknown key, did you mean tokens? (1)"),
        ("model.router.zzz=true", "model.router.zzz: unknown key (true)"),
        ("sever.port=1", 'sever: unknown key ({"port": 1})'),
        ("train.tokens=many", 'train.tokens: expected an integer ("many")'),
        ("train.tokens=1.5", "train.tokens: expected an integer (1.5)"),
        ("train.tokens=true", "train.tokens: expected an integer (true)"),
        ("train.tensorboard=1", "train.tensorboard: expected true or false (1)"),
        ("model.num_experts=[0, true]", "model.num_experts: expected an integer or a list of integers ([0, true])"),
        ("train.learning_rate=0", "train.learning_rate: must be above 0 (0)"),
        ("train.learning_rate=nan", "train.learning_rate: must be finite (nan)"),
        ("train.beta2=1.0", "train.beta2: must be below 1 (1.0)"),
        ("train.dtype=fp8", 'train.dtype: must be one of fp32, bf16 ("fp8")'),
        ("model.num_hidden_layers=0", "model.num_hidden_layers: must be at least 1 (0)"),
        ("model.residual=plus", 'model.residual: must be one of none, sum, learned, shared_gate ("plus")'),
        ("model.top_k=5", "model.top_k: exceeds num_experts of layer 1, 4 (5)"),
        ("model.num_experts=[4]", "model.num_experts: has 1 entries for 2 layers (num_hidden_layers) ([4])"),
        ("model.router.jitter=1.0", "model.router.jitter: must be below 1 (1.0)"),
        ("model.router.num_groups=3", "model.router.num_groups: does not divide num_experts of layer 1, 4 (3)"),
        ("model.router.top_k_groups=2", "model.router.top_k_groups: exceeds num_groups, 1 (2)"),
        (
            "model.router={num_groups = 2, top_k_groups = 1}",
            "model.router.top_k_groups: leaves 2 experts for top_k of layer 1, 3 (1)",
        ),
        (
            'model.router={num_groups = 4, top_k_groups = 4, group_score = "top2"}',
            'model.router.group_score: needs two experts in a group, layer 1 has one ("top2")',
        ),
        (
            "model.router.choice_noise=second_expert",
            'model.router.choice_noise: needs top_k = 2, layer 1 has 3 ("second_expert")',
        ),
        ("model.router.chooser=experts", 'model.router.chooser: needs a capacity_factor above 0 ("experts")'),
        (
            'model.router={chooser = "experts", capacity_factor = 1, choice_noise = "rsample"}',
            'model.router.chooser: does not go with choice_noise, "rsample" ("experts")',
        ),
        ("model.hidden_size=66", "model.hidden_size: is not a multiple of num_attention_heads, 4; set head_dim (66)"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads: does not divide num_attention_heads, 4 (3)"),
        ("model.head_dim=15", "model.head_dim: must be even for rotary positions (15)"),
        (
            "model.max_position_embeddings=16",
            "data.sequence_length: exceeds model.max_position_embeddings, 16 (32)",
        ),
        (
            "train.gradient_accumulation_steps=3",
            "train.gradient_accumulation_steps: does not divide batch_size, 4 (3)",
        ),
        ("train.tokens=100", "train.tokens: is less than one step, batch_size x sequence_length = 128 (100)"),
        ("train.min_learning_rate=1", "train.min_learning_rate: exceeds learning_rate, 0.001 (1.0)"),
        ("train.decay_tokens=100", "train.decay_tokens: is less than warmup_tokens, 512 (100)"),
        ("train.warmup_tokens=5000", "train.warmup_tokens: exceeds tokens, 4096 (5000)"),
        ("data.path=nowhere", "data.path: nowhere: no meta.json there: make the data with `coterie data`"),
        ("model.vocab_size=299", "model.vocab_size: is smaller than the vocabulary of DATA, 300 (299)"),
        ("model.eos_token_id=300", "model.eos_token_id: is not below vocab_size, 300 (300)"),
        ("distill.teacher=x", 'distill.teacher: no config.json there: train and export the teacher first ("x")'),
        ("distill.alpha=1", "distill.teacher: key is missing"),
        ("model=1", None),
    ],
)
def test_a_refusal_names_file_key_and_value(path: Path, override: str, message: str | None):
    with pytest.raises(ConfigError) as refused:
        configuration.load(path, [override]).resolve()
    if message is None:
        assert str(refused.value) == f"--set: {override}: expected section.key=value"
    else:
        assert str(refused.value) == f"{path}: {message}".replace("DATA", str(path.parent / "data"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = 4", "", "train.batch_size: key is missing"),
        ("[data]", "[dta]", 'dta: unknown key, did you mean data? ({"path": "DATA", "sequence_length": 32})'),
        ("hidden_size = 64", "hidden_size = ", "not valid TOML: Invalid value (at line 3, column 15)"),
    ],
)
def test_a_broken_file_is_refused(path: Path, old: str, new: str, message: str):
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError) as refused:
        configuration.load(path)
    assert str(refused.value) == f"{path}: {message}".replace("DATA", str(path.parent / "data"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("stop_at = 1.5", "distill.stop_at: must be a fraction in (0, 1] or a whole step above 1 (1.5)"),
        ("drop_layers = [1, 1]", "distill.drop_layers: names a layer twice ([1, 1])"),
        (
            'drop_layers = [1]\nstudent_init = "random"',
            'distill.drop_layers: needs student_init = "teacher" ([1])',
        ),
    ],
)
def test_a_distillation_that_cannot_be_is_refused(path: Path, section: str, message: str):
    path.write_text(path.read_text() + f'\n[distill]\nteacher = "t"\n{section}\n')
    with pytest.raises(ConfigError) as refused:
        configuration.load(path)
    assert str(refused.value) == f"{path}: {message}"


@pytest.mark.parametrize("name", ["dense", "moe", "pr_moe", "mos"])
def test_the_demos_configurations_hold(name: str):
    config = configuration.load(ROOT / "configs" / "demo" / f"{name}.toml")
    assert len(configuration.model_config(config.model, 256)["layers"]) == config.model.num_hidden_layers


def test_the_demos_models_see_the_same_tokens():
    configs = [configuration.load(file) for file in sorted((ROOT / "configs" / "demo").glob("*.toml"))]
    assert len(configs) == 4
    assert len({(config.train.tokens, config.train.batch_size, config.data.sequence_length) for config in configs}) == 1


def documented_keys(section: str) -> dict[str, str]:
    """The keys of a section's table in docs/configuration.md, with what stands under "default"."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    part = text.partition(f"## [{section}]\n")[2].partition("\n## ")[0]
    keys: dict[str, str] = {}
    for row in re.findall(r"^\| (`.*?)(?<!\\) \| (.*?) \| ", part, re.MULTILINE):
        names = re.findall(r"`(\w+)`", row[0])
        defaults = row[1].split(", ") if len(names) > 1 else [row[1]]
        keys |= dict(zip(names, defaults, strict=True))
    return keys


@pytest.mark.parametrize(
    ("section", "cls"),
    [
        ("model", configuration.ModelSection),
        ("model.router", configuration.RouterSection),
        ("data", configuration.DataSection),
        ("train", configuration.TrainSection),
        ("parallel", configuration.ParallelSection),
        ("distill", configuration.DistillSection),
    ],
)
def test_the_documentation_has_every_key_and_its_default(section: str, cls: type):
    documented = documented_keys(section)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "router"}
    assert documented.keys() == fields.keys()
    for key, text in documented.items():
        default = fields[key].default
        said = text.removesuffix("; list")
        if default is dataclasses.MISSING:
            assert said == "required", key
        elif default is None:  # what it is instead is said in words
            assert said not in ("required", ""), key
        else:
            value = tomllib.loads(f"value = {said}")["value"]
            assert (type(value), value) == (type(default), default), key
