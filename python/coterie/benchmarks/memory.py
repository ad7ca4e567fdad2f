"""What training holds per rank: `coterie bench memory`.

Bytes of weights, gradients (at the peak of a step), fp32 master weights and moments; activations are left out. They
are measured on real models and optimizers, whose ranks are threads of this process, or counted from shapes alone by
the arithmetic that lays out the optimizer's tensors. Beside either stands the formula of ZeRO (Rajbhandari et al.
2020, section 5), which knows no buckets, no padding and no vectors in fp32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie import config as configuration
from coterie.benchmarks.cells import DTYPE_BYTES
from coterie.benchmarks.worker import BenchError, memory_of_machine
from coterie.training import load_torch

KINDS = ("weights", "gradients", "masters", "moments")
TOLERANCE = 0.02
STAGES = (0, 1, 2)
MOST_THREADS = 64


@dataclass(frozen=True)
class Subject:
    """A model with the settings that its layout follows from.

    Parameters
    ----------
    name
        For people.
    model
        Its config.json.
    dtype
        Of its matrices, where nothing else is asked for.
    reduce_bucket_size, expert_parallel, passes
        As in [parallel], and gradient_accumulation_steps.
    """

    name: str
    model: dict[str, Any]
    dtype: str = "bf16"
    reduce_bucket_size: int = 4_194_304
    expert_parallel: Any = "auto"
    passes: int = 1

    def case(self, dtype: str, ranks: int) -> Any:
        """A coterie._train.MemoryCase."""
        from coterie import _train

        config, degrees = json.dumps(self.model), json.dumps(self.expert_parallel)
        return _train.MemoryCase(config, dtype, ranks, degrees, self.reduce_bucket_size, self.passes)


def gpt(
    layers: int,
    hidden: int,
    heads: int,
    vocabulary: int,
    sequence: int,
    experts: Sequence[int],
    residual: str = "none",
) -> dict[str, Any]:
    """config.json of GPT-2's architecture; `experts` of every second layer, or none, and what stands beside them."""
    model = configuration.ModelSection(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_experts=[experts[i // 2] if experts and i % 2 else 0 for i in range(layers)],
        residual=residual,
        vocab_size=vocabulary,
        norm_type="layer_norm",
        position_embedding_type="learned",
        hidden_act="gelu",
        gated_mlp=False,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    return configuration.model_config(model, sequence)


DEFAULT = "42m-moe"
# The default is made for measuring on one machine: a pyramid of experts, and buckets as small beside it as the usual
# ones are beside a model of billions. The others are only counted: Megatron-Turing NLG, and the trillion of
# DeepSpeed-MoE's models, a base of 24B with 128 experts in every second layer.
SHAPES = {
    DEFAULT: lambda: Subject(DEFAULT, gpt(24, 256, 4, 1024, 256, [4] * 10 + [8] * 2), reduce_bucket_size=65_536),
    "530b-dense": lambda: Subject("530b-dense", gpt(105, 20480, 128, 50257, 2048, [])),
    "1t-moe": lambda: Subject("1t-moe", gpt(30, 8192, 64, 50257, 2048, [128] * 15)),
}


def named(name: str) -> Subject:
    """One of SHAPES; BenchError for another name."""
    if name not in SHAPES:
        raise BenchError(f"--model: no shape is called {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]()


def of_file(path: Path) -> Subject:
    """The model and layout of a training configuration. Its data is only asked for a vocabulary that it leaves out."""
    config = configuration.load(path)
    model = configuration.model_config(config.model, config.data.sequence_length)
    if config.model.vocab_size is None:
        model["vocab_size"] = config.resolve().model["vocab_size"]
    return Subject(
        str(path),
        model,
        config.train.dtype,
        config.parallel.reduce_bucket_size,
        config.parallel.expert_parallel,
        config.train.gradient_accumulation_steps,
    )


def measure(subject: Subject, ranks: Sequence[int], stages: Sequence[int], dtypes: Sequence[str]) -> dict[str, Any]:
    """Every layout, made for real.

    Parameters
    ----------
    subject
        The model.
    ranks, stages, dtypes
        The layouts.

    Returns
    -------
    dict
        model, parameters and results: of each layout `measured` and `planned` (what counting alone says), `formula`,
        each by kind and of the rank that holds most, the `least` of any rank, and `difference`, which is
        total / total of the formula - 1, of the rank where it is largest.

    Raises
    ------
    BenchError
        When this machine has too little memory.
    """
    load_torch()
    results = []
    for dtype in dtypes:
        for size in ranks:
            if size > MOST_THREADS:
                raise BenchError(f"--ranks: more than {MOST_THREADS} are only counted, with --plan ({size})")
            case = subject.case(dtype, size)
            planned = [case.plan(stage) for stage in stages]
            _require_memory(max(sum(map(_total, ranks_bytes)) for ranks_bytes in planned), size)
            for stage, counted, held in zip(stages, planned, case.measure(list(stages)), strict=True):
                result = _result(subject, case, dtype, size, stage, held)
                results.append({**result, "planned": max(counted, key=_total)})
    return _report(subject, measured=True, results=results)


def plan(subject: Subject, ranks: Sequence[int], stages: Sequence[int], dtypes: Sequence[str]) -> dict[str, Any]:
    """Every layout, counted from shapes; returns what `measure` does, `measured` being counted."""
    load_torch()
    results = []
    for dtype in dtypes:
        for size in ranks:
            case = subject.case(dtype, size)
            for stage in stages:
                results.append(_result(subject, case, dtype, size, stage, case.plan(stage)))
    return _report(subject, measured=False, results=results)


def formula(model: dict[str, Any], dtype: str, ranks: int, stage: int, degrees: Sequence[int]) -> dict[str, float]:
    """ZeRO's bytes per rank by kind; `degrees`: of expert parallelism, of every MoE layer.

    What N ranks hold alike costs, of P parameters, 2P bytes of 16-bit weights, 2P of gradients and 12P of masters and
    moments, the last from stage 1 on divided by N, gradients at stage 2. fp32 weights, their own masters, cost 4P, 4P
    and 8P. Of the experts of a layer, degree d means a d-th per rank, which ranks / d hold alike.
    """
    width = DTYPE_BYTES[dtype]
    held = dict.fromkeys(KINDS, 0.0)
    for parameters, replicas in _holdings(model, ranks, degrees):
        states = parameters / (replicas if stage >= 1 else 1)
        held["weights"] += width * parameters
        held["gradients"] += width * parameters / (replicas if stage == 2 else 1)
        held["masters"] += 4 * states if dtype == "bf16" else 0
        held["moments"] += 8 * states
    return held


def _holdings(model: dict[str, Any], ranks: int, degrees: Sequence[int]) -> list[tuple[float, float]]:
    """Parameters that a rank holds, and how many ranks hold them."""
    experts = [_expert_parameters(model, layer) for layer in model["layers"] if layer["num_experts"]]
    shared = _parameters(model)[0] - sum(experts)
    return [(shared, ranks), *((n / d, ranks / d) for n, d in zip(experts, degrees, strict=True))]


def _expert_parameters(model: dict[str, Any], layer: dict[str, Any]) -> int:
    hidden, inner = model["hidden_size"], layer["expert_intermediate_size"]
    up = 2 * inner if model["gated_mlp"] else inner
    biases = up + hidden if model["mlp_bias"] else 0
    return layer["num_experts"] * (hidden * up + inner * hidden + biases)


def _parameters(model: dict[str, Any]) -> tuple[int, int]:
    from coterie import _engine

    return _engine.count_parameters(json.dumps(model))


def _total(held: dict[str, float]) -> float:
    return sum(held[kind] for kind in KINDS)


def _result(
    subject: Subject, case: Any, dtype: str, ranks: int, stage: int, held: Sequence[dict[str, int]]
) -> dict[str, Any]:
    expected = formula(subject.model, dtype, ranks, stage, case.degrees())
    most, least = max(held, key=_total), min(held, key=_total)
    differences = [_total(one) / _total(expected) - 1 for one in (most, least)]
    return {
        "dtype": dtype,
        "ranks": ranks,
        "zero_stage": stage,
        "expert_parallel": case.degrees(),
        "bytes": {**most, "total": _total(most)},
        "least": {**least, "total": _total(least)},
        "formula": {**expected, "total": _total(expected)},
        "difference": max(differences, key=abs),
    }


def _report(subject: Subject, measured: bool, results: list[dict[str, Any]]) -> dict[str, Any]:
    total, active = _parameters(subject.model)
    worst = max((result["difference"] for result in results), key=abs)
    return {
        "model": subject.name,
        "params_total": total,
        "params_active": active,
        "reduce_bucket_size": subject.reduce_bucket_size,
        "measured": measured,
        "results": results,
        "worst_difference": worst,
        "tolerance": TOLERANCE,
        "within_tolerance": math.fabs(worst) <= TOLERANCE,
    }


def _require_memory(needed: float, ranks: int) -> None:
    free = memory_of_machine("MemAvailable")
    if needed > free:
        message = f"{ranks} would hold {needed / 1e9:.1f} GB together, {free / 1e9:.1f} GB are free; --plan only counts"
        raise BenchError(f"--ranks: {message}")
