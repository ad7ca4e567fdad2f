"""The TOML file of a training run: its sections as dataclasses, every key checked by name.

A file is read in three steps: `load` parses it, applies `--set` overrides and checks each key by
itself (type, range, choice) and against the others; `Config.resolve` looks at the data and the
teacher that the file names; the result is the pair of JSON strings that `coterie._train.Trainer`
takes. Every error is a `ConfigError` with one line, `FILE: section.key: message (value)`.

docs/configuration.md describes each key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.data import DataError, read_meta
from coterie.router_choices import MOST_EXPERTS_THAT_CHOOSE, RESIDUALS, ROUTER_CHOICES

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish")


class ConfigError(ValueError):
    """A configuration that cannot be: one line naming file, key and value."""


def _key(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A key of a section: its default (none: the key is required) and the values it may have."""
    limits = {"least": least, "above": above, "below": below, "choices": choices}
    metadata = {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(default, list | dict):
        raise TypeError("mutable default")
    return field(default=default, metadata=metadata)


@dataclass
class RouterSection:
    """[model.router]: how tokens choose experts, the same in every MoE layer."""

    score_function: str = _key("softmax", choices=ROUTER_CHOICES["score_function"])
    chooser: str = _key("tokens", choices=ROUTER_CHOICES["chooser"])
    num_groups: int = _key(1, least=1)
    top_k_groups: int = _key(1, least=1)
    group_score: str = _key("max", choices=ROUTER_CHOICES["group_score"])
    choice_bias: bool = _key(False)
    normalize: bool = _key(False)
    normalize_over: str = _key("chosen", choices=ROUTER_CHOICES["normalize_over"])
    routed_scaling: float = _key(1.0, above=0)
    choice_noise: str = _key("none", choices=ROUTER_CHOICES["choice_noise"])
    jitter: float = _key(0.0, least=0, below=1)
    capacity_factor: float = _key(0.0, least=0)
    eval_capacity_factor: float = _key(0.0, least=0)
    min_capacity: int = _key(4, least=0)
    drop_policy: str = _key("random", choices=ROUTER_CHOICES["drop_policy"])


@dataclass
class ModelSection:
    """[model]: the keys of a CoterieForCausalLM config.json, with flat keys in place of `layers`."""

    hidden_size: int = _key(least=1)
    num_hidden_layers: int = _key(least=1)
    num_attention_heads: int = _key(least=1)
    intermediate_size: int | list[int] = _key(least=1)
    num_experts: int | list[int] = _key(0, least=0)
    top_k: int | list[int] = _key(1, least=1)
    expert_intermediate_size: int | list[int] | None = _key(None, least=1)
    residual: str | list[str] = _key("none", choices=RESIDUALS)
    num_key_value_heads: int | None = _key(None, least=1)
    head_dim: int | None = _key(None, least=1)
    vocab_size: int | None = _key(None, least=1)
    max_position_embeddings: int | None = _key(None, least=1)
    norm_type: str = _key("rms_norm", choices=("rms_norm", "layer_norm"))
    norm_eps: float = _key(1e-5, above=0)
    position_embedding_type: str = _key("rope", choices=("rope", "learned"))
    rope_theta: float = _key(10000.0, above=0)
    qk_norm: str = _key("none", choices=("none", "head", "full"))
    hidden_act: str = _key("silu", choices=ACTIVATIONS)
    gated_mlp: bool = _key(True)
    attention_bias: bool = _key(False)
    attention_output_bias: bool = _key(False)
    mlp_bias: bool = _key(False)
    tie_word_embeddings: bool = _key(True)
    initializer_range: float = _key(0.02, above=0)
    bos_token_id: int | None = _key(None, least=0)
    eos_token_id: int | None = _key(None, least=0)
    router: RouterSection = field(default_factory=RouterSection)


@dataclass
class DataSection:
    """[data]: a directory made by `coterie data`, and the length of the sequences cut from it."""

    path: str = _key()
    sequence_length: int = _key(least=2)


@dataclass
class TrainSection:
    """[train]: how long, how fast, and what is kept."""

    output_dir: str = _key()
    tokens: int = _key(least=1)
    batch_size: int = _key(least=1)
    learning_rate: float = _key(above=0)
    gradient_accumulation_steps: int = _key(1, least=1)
    min_learning_rate: float | None = _key(None, least=0)
    warmup_tokens: int = _key(0, least=0)
    decay_tokens: int | None = _key(None, least=1)
    weight_decay: float = _key(0.1, least=0)
    beta1: float = _key(0.9, least=0, below=1)
    beta2: float = _key(0.95, least=0, below=1)
    eps: float = _key(1e-8, above=0)
    max_grad_norm: float = _key(1.0, least=0)
    balance_loss: float = _key(0.01, least=0)
    balance_loss_choices: str = _key("all", choices=("all", "first"))
    balance_loss_scope: str = _key("micro_batch", choices=("micro_batch", "global_batch"))
    z_loss: float = _key(0.0, least=0)
    choice_bias_rate: float = _key(1e-3, least=0)
    dtype: str = _key("fp32", choices=("fp32", "bf16"))
    seed: int = _key(0, least=0)
    threads: int = _key(0, least=0)
    eval_every: int = _key(0, least=0)
    eval_tokens: int = _key(0, least=0)
    save_every: int = _key(0, least=0)
    keep_checkpoints: int = _key(2, least=1)
    tensorboard: bool = _key(False)


@dataclass
class ParallelSection:
    """[parallel]: how the work is spread over ranks."""

    zero_stage: int = _key(1, choices=(0, 1, 2))
    reduce_bucket_size: int = _key(4_194_304, least=1)
    expert_parallel: str | int | list[int] = _key("auto", choices=("auto",), least=1)
    ranks_per_node: int = _key(0, least=0)
    all_to_all: str = _key("auto", choices=("auto", "flat", "hierarchical"))
    moments_dtype: str = _key("fp32", choices=("fp32", "bf16"))
    offload_optimizer: str = _key("")
    timeout_s: float = _key(600.0, above=0)


@dataclass
class DistillSection:
    """[distill]: the teacher, and for how long the student listens to it."""

    teacher: str = _key()
    alpha: float = _key(1.0, least=0)
    temperature: float = _key(1.0, above=0)
    stop_at: float = _key(1.0, above=0)
    student_init: str = _key("teacher", choices=("teacher", "random"))
    drop_layers: list[int] | None = _key(None, least=0)


@dataclass
class Config:
    """One configuration file, checked."""

    source: str
    model: ModelSection
    data: DataSection
    train: TrainSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    distill: DistillSection | None = None

    def error(self, key: str, message: str, value: Any) -> ConfigError:
        return _error(self.source, key, message, value)

    def check_ranks(self, ranks: int) -> None:
        """Refuses a number of ranks that can't share the batches equally."""
        sequences = self.train.batch_size // self.train.gradient_accumulation_steps
        if sequences % ranks:
            message = f"batch_size / gradient_accumulation_steps, {sequences}, is not divisible by {ranks} ranks"
            raise self.error("train.batch_size", message, self.train.batch_size)

    def resolve(self) -> ResolvedConfig:
        """What the trainer is started with; looks into the data directory and the teacher's.

        Raises
        ------
        ConfigError
            When the data or the teacher is not there, or doesn't fit the model.
        """
        try:
            meta = read_meta(Path(self.data.path))
        except DataError as error:
            raise ConfigError(f"{self.source}: data.path: {error}") from None
        model = model_config(self.model, self.data.sequence_length)
        model["vocab_size"] = self.model.vocab_size or meta["vocab_size"]
        if model["vocab_size"] < meta["vocab_size"]:
            message = f"is smaller than the vocabulary of {self.data.path}, {meta['vocab_size']}"
            raise self.error("model.vocab_size", message, model["vocab_size"])
        model["eos_token_id"] = meta["eos_token_id"] if self.model.eos_token_id is None else self.model.eos_token_id
        for key in ("bos_token_id", "eos_token_id"):
            if key in model and model[key] >= model["vocab_size"]:
                raise self.error(f"model.{key}", f"is not below vocab_size, {model['vocab_size']}", model[key])
        if self.distill and not (Path(self.distill.teacher) / "config.json").is_file():
            message = "no config.json there: train and export the teacher first"
            raise self.error("distill.teacher", message, self.distill.teacher)
        settings = {
            "data": dataclasses.asdict(self.data),
            "train": dataclasses.asdict(self.train),
            "parallel": dataclasses.asdict(self.parallel),
            "distill": dataclasses.asdict(self.distill) if self.distill else None,
        }
        return ResolvedConfig(self.source, model, settings)


@dataclass
class ResolvedConfig:
    """The model's config.json and the trainer's settings, as plain values; source is for messages."""

    source: str
    model: dict[str, Any]
    settings: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        return Path(self.settings["train"]["output_dir"])


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads and checks a configuration file.

    Parameters
    ----------
    path : str or Path
        A TOML file with the sections [model], [data], [train], perhaps [parallel] and, to distill, [distill].
    overrides : list of str
        `section.key=value`, the value in TOML; text that is not TOML stands for itself, so that
        paths need no second pair of quotes. Applied in order, before the checks.

    Raises
    ------
    ConfigError
        One line naming file, key and value.
    FileNotFoundError
        When there is no such file.
    """
    source = str(path)
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(table, override)
    sections = {
        "model": ModelSection,
        "data": DataSection,
        "train": TrainSection,
        "parallel": ParallelSection,
        "distill": DistillSection,
    }
    for name, value in table.items():
        if name not in sections:
            raise _unknown_key(source, "", name, value, list(sections))
    for name in ("model", "data", "train"):
        if name not in table:
            raise ConfigError(f"{source}: {name}: section is missing")
    read = {name: _read_section(cls, table[name], source, name) for name, cls in sections.items() if name in table}
    config = Config(source=source, **read)
    _check(config)
    _fill_defaults(config)
    return config


def model_config(model: ModelSection, sequence_length: int) -> dict[str, Any]:
    """The config.json (CoterieForCausalLM) of a checked [model]; vocab_size and eos_token_id are left out."""
    values = {
        key.name: getattr(model, key.name)
        for key in dataclasses.fields(model)
        if key.name not in _LAYER_KEYS and key.name != "router" and getattr(model, key.name) is not None
    }
    values.setdefault("num_key_value_heads", model.num_attention_heads)
    values.setdefault("head_dim", model.hidden_size // model.num_attention_heads)
    values.setdefault("max_position_embeddings", sequence_length)
    return {
        "architectures": ["CoterieForCausalLM"],
        "model_type": "coterie",
        **values,
        "layers": [_layer(model, index) for index in range(model.num_hidden_layers)],
    }


_LAYER_KEYS = ("intermediate_size", "num_experts", "top_k", "expert_intermediate_size", "residual")


def _of_layer(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list) else value


def _layer(model: ModelSection, index: int) -> dict[str, Any]:
    intermediate_size, num_experts, top_k, expert_size, residual = (
        _of_layer(getattr(model, key), index) for key in _LAYER_KEYS
    )
    if num_experts == 0:
        return {"num_experts": 0, "intermediate_size": intermediate_size}
    layer = {
        "num_experts": num_experts,
        "top_k": top_k,
        "expert_intermediate_size": expert_size or intermediate_size,
        "residual": residual,
        "router": dataclasses.asdict(model.router),
    }
    if residual != "none":
        layer["intermediate_size"] = intermediate_size
    return layer


# --- reading ---------------------------------------------------------------------------------------


def _error(source: str, key: str, message: str, value: Any) -> ConfigError:
    return ConfigError(f"{source}: {key}: {message} ({_shown(value)})")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str | list | dict) else str(value)


def _unknown_key(source: str, section: str, name: str, value: Any, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return _error(source, f"{section}.{name}" if section else name, f"unknown key{hint}", value)


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set: {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set: {override}: {part} is not a section")
    table[parts[-1]] = value


def _read_section(cls: type, table: Any, source: str, section: str) -> Any:
    if not isinstance(table, dict):
        raise _error(source, section, "expected a section", table)
    keys = {key.name: key for key in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in table.items():
        if name not in keys:
            raise _unknown_key(source, section, name, value, list(keys))
        where = f"{section}.{name}"
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _read_section(hints[name], value, source, where)
        else:
            values[name] = _read_value(hints[name], keys[name].metadata, value, source, where)
    for name, key in keys.items():
        if name not in values and key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{source}: {section}.{name}: key is missing")
    return cls(**values)


def _read_value(hint: Any, limits: Any, value: Any, source: str, where: str) -> Any:
    options = [option for option in _options(hint) if option is not types.NoneType]
    for option in options:
        if typing.get_origin(option) is list:
            (element,) = typing.get_args(option)
            if isinstance(value, list) and all(_has_type(item, element) for item in value):
                for item in value:
                    _check_limits(item, limits, source, where, value)
                return value
        elif _has_type(value, option):
            _check_limits(value, limits, source, where, value)
            return float(value) if option is float else value
    raise _error(source, where, f"expected {' or '.join(_type_name(option) for option in options)}", value)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _has_type(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, int | float) if wanted is float else isinstance(value, wanted)


def _type_name(option: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if typing.get_origin(option) is list:
        return "a list of " + {int: "integers", str: "strings"}[typing.get_args(option)[0]]
    return names[option]


def _is_comparable(item: Any, limit: Any) -> bool:
    """Where a key may be a word or a number, words have their choices and numbers their range."""
    sample = limit[0] if isinstance(limit, tuple) else limit
    return isinstance(item, str) == isinstance(sample, str)


def _check_limits(item: Any, limits: Any, source: str, where: str, value: Any) -> None:
    if isinstance(item, float) and not math.isfinite(item):
        raise _error(source, where, "must be finite", value)
    for name, holds, words in (
        ("least", lambda limit: item >= limit, "must be at least"),
        ("above", lambda limit: item > limit, "must be above"),
        ("below", lambda limit: item < limit, "must be below"),
        ("choices", lambda limit: item in limit, "must be one of"),
    ):
        if name in limits and _is_comparable(item, limits[name]) and not holds(limits[name]):
            limit = ", ".join(map(str, limits[name])) if name == "choices" else limits[name]
            raise _error(source, where, f"{words} {limit}", value)


# --- checks of one key against another -------------------------------------------------------------


def _check(config: Config) -> None:
    _check_attention(config)
    _check_layers(config)
    _check_train(config)
    if config.distill:
        _check_distill(config)


def _check_attention(config: Config) -> None:
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        message = f"is not a multiple of num_attention_heads, {model.num_attention_heads}; set head_dim"
        raise config.error("model.hidden_size", message, model.hidden_size)
    kv_heads = model.num_key_value_heads
    if kv_heads is not None and model.num_attention_heads % kv_heads:
        message = f"does not divide num_attention_heads, {model.num_attention_heads}"
        raise config.error("model.num_key_value_heads", message, kv_heads)
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    if model.position_embedding_type == "rope" and head_dim % 2:
        raise config.error("model.head_dim", "must be even for rotary positions", head_dim)
    positions = model.max_position_embeddings
    if positions is not None and config.data.sequence_length > positions:
        message = f"exceeds model.max_position_embeddings, {positions}"
        raise config.error("data.sequence_length", message, config.data.sequence_length)


def _check_layers(config: Config) -> None:
    model = config.model
    for key in _LAYER_KEYS:
        value = getattr(model, key)
        if isinstance(value, list) and len(value) != model.num_hidden_layers:
            message = f"has {len(value)} entries for {model.num_hidden_layers} layers (num_hidden_layers)"
            raise config.error(f"model.{key}", message, value)
    for index in range(model.num_hidden_layers):
        num_experts, top_k = _of_layer(model.num_experts, index), _of_layer(model.top_k, index)
        if 0 < num_experts < top_k:
            message = f"exceeds num_experts of layer {index}, {num_experts}"
            raise config.error("model.top_k", message, top_k)
        if num_experts > 0:
            _check_router(config, index, num_experts, top_k)


def _check_router(config: Config, index: int, num_experts: int, top_k: int) -> None:
    """The rules of RouterConfig::validate in src/moe/router_config.cc, for one layer."""
    router = config.model.router
    groups, best = router.num_groups, router.top_k_groups
    size = num_experts // groups
    of_layer = f"num_experts of layer {index}, {num_experts}"

    def require(condition: bool, key: str, message: str) -> None:
        if not condition:
            raise config.error(f"model.router.{key}", message, getattr(router, key))

    require(num_experts % groups == 0, "num_groups", f"does not divide {of_layer}")
    require(best <= groups, "top_k_groups", f"exceeds num_groups, {groups}")
    require(top_k <= best * size, "top_k_groups", f"leaves {best * size} experts for top_k of layer {index}, {top_k}")
    if groups > 1 and router.group_score == "top2":
        require(size >= 2, "group_score", f"needs two experts in a group, layer {index} has one")
    if router.choice_noise == "second_expert":
        require(top_k == 2, "choice_noise", f"needs top_k = 2, layer {index} has {top_k}")
    if router.chooser == "experts":
        require(router.capacity_factor > 0, "chooser", "needs a capacity_factor above 0")
        require(groups == 1, "chooser", f"does not go with num_groups, {groups}")
        require(not router.choice_bias, "chooser", "does not go with choice_bias, true")
        require(router.choice_noise == "none", "chooser", f'does not go with choice_noise, "{router.choice_noise}"')
        most = MOST_EXPERTS_THAT_CHOOSE
        require(num_experts <= most, "chooser", f"is for at most {most} experts, layer {index} has {num_experts}")


def _check_train(config: Config) -> None:
    train = config.train
    if train.batch_size % train.gradient_accumulation_steps:
        message = f"does not divide batch_size, {train.batch_size}"
        raise config.error("train.gradient_accumulation_steps", message, train.gradient_accumulation_steps)
    step_tokens = train.batch_size * config.data.sequence_length
    if train.tokens < step_tokens:
        message = f"is less than one step, batch_size x sequence_length = {step_tokens}"
        raise config.error("train.tokens", message, train.tokens)
    if train.min_learning_rate is not None and train.min_learning_rate > train.learning_rate:
        message = f"exceeds learning_rate, {train.learning_rate}"
        raise config.error("train.min_learning_rate", message, train.min_learning_rate)
    if train.decay_tokens is not None and train.decay_tokens < train.warmup_tokens:
        message = f"is less than warmup_tokens, {train.warmup_tokens}"
        raise config.error("train.decay_tokens", message, train.decay_tokens)
    if train.warmup_tokens > train.tokens:
        raise config.error("train.warmup_tokens", f"exceeds tokens, {train.tokens}", train.warmup_tokens)


def _check_distill(config: Config) -> None:
    distill = config.distill
    assert distill is not None
    if distill.stop_at > 1 and distill.stop_at != int(distill.stop_at):
        raise config.error("distill.stop_at", "must be a fraction in (0, 1] or a whole step above 1", distill.stop_at)
    if distill.drop_layers is not None:
        if distill.student_init != "teacher":
            message = 'needs student_init = "teacher"'
            raise config.error("distill.drop_layers", message, distill.drop_layers)
        if len(set(distill.drop_layers)) != len(distill.drop_layers):
            raise config.error("distill.drop_layers", "names a layer twice", distill.drop_layers)


def _fill_defaults(config: Config) -> None:
    """The defaults that depend on other keys."""
    train = config.train
    if train.min_learning_rate is None:
        train.min_learning_rate = 0.1 * train.learning_rate
    if train.decay_tokens is None:
        train.decay_tokens = train.tokens
    if config.distill and config.distill.drop_layers is None:
        config.distill.drop_layers = []
