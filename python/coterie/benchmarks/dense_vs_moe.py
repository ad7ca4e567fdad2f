"""What `coterie bench dense-vs-moe` does: latency and memory of models of equal quality, dense and with experts.

The shapes are those of DeepSpeed-MoE (Rajbhandari et al. 2022): 1.3 billion dense parameters reach about the loss of a
base of 350 million with 128 experts in every second layer, of a pyramid of 32 and 64 experts beside a fixed MLP
(PR-MoE), and of the student of 21 layers that was distilled from it (MoS). Their weights are random numbers, made in
memory. Each model is a process of its own; those that fit into memory together take turns, test by test.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.benchmarks import infer, infer_contestants
from coterie.benchmarks.memory import gpt
from coterie.benchmarks.worker import OURS, READ_BYTES, BenchError, Worker, machine, memory_of_machine

VOCABULARY = 50257
SEQUENCE = 2048


def _base_350m(layers: int, experts: Sequence[int], residual: str = "none") -> dict[str, Any]:
    return gpt(layers, 1024, 16, VOCABULARY, SEQUENCE, experts, residual)


# The student is without two layers of few experts and a dense one (section 4 there).
SHAPES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense-1.3b": lambda: gpt(24, 2048, 16, VOCABULARY, SEQUENCE, []),
    "350m-moe-128": lambda: _base_350m(24, [128] * 12),
    "350m-pr-moe-32-64": lambda: _base_350m(24, [32] * 10 + [64] * 2, "sum"),
    "350m-pr-moe-mos": lambda: _base_350m(21, [32] * 8 + [64] * 2, "sum"),
}


@dataclass(frozen=True)
class Settings:
    """How to measure: as in infer."""

    prompt: int = 32
    generate: int = 64
    batches: tuple[int, ...] = (1,)
    threads: int = 2
    rounds: int = 3

    @property
    def length(self) -> int:
        return self.prompt + self.generate + 1


@dataclass
class Subject:
    """A model under test."""

    name: str
    config: dict[str, Any]
    dtype: str
    parameters: int = 0
    active: int = 0
    rates: dict[int, list[float]] = field(default_factory=dict)
    rss_bytes: int | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        from coterie import _engine

        self.parameters, self.active = _engine.count_parameters(json.dumps(self.config))

    @property
    def need_bytes(self) -> float:
        """While it serves: weights, and half a gigabyte for caches and the process."""
        return self.parameters * infer_contestants.OUR_BITS[self.dtype] / 8 + 5e8

    @property
    def packing_bytes(self) -> float:
        """Beside them while they are packed: the largest tensor in fp32, twice."""
        experts = max(layer["num_experts"] for layer in self.config["layers"])
        return 2 * 4 * 4 * self.config["hidden_size"] ** 2 * max(experts, 1)


def subjects(names: Sequence[str], dtype: str) -> list[Subject]:
    """Models of SHAPES, with weights of a dtype; BenchError for another name."""
    for name in names:
        if name not in SHAPES:
            raise BenchError(f"--models: no shape is called {name!r}; known: {', '.join(SHAPES)}")
    return [Subject(name, SHAPES[name](), dtype) for name in names]


def run(
    models: Sequence[Subject], settings: Settings, progress: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measure models.

    Parameters
    ----------
    models
        The first one is what the others are compared with.
    progress
        Is told what happens next.

    Returns
    -------
    dict
        machine, settings and models, as docs/serving-performance.md describes them.
    """
    from coterie import _engine

    limits = _engine.Limits(settings.threads, READ_BYTES)
    bandwidths = [limits.read_bandwidth()]
    with tempfile.TemporaryDirectory(prefix="coterie-bench-") as folder:
        for group in _groups(models):
            with ExitStack() as stack:
                workers = [_start(subject, Path(folder), settings, stack, progress) for subject in group]
                for turn in range(settings.rounds):
                    bandwidths.append(limits.read_bandwidth())
                    for batch in settings.batches:
                        for subject, worker in zip(group, workers, strict=True):
                            if not subject.reason:
                                progress(f"{subject.name}: round {turn + 1}, batch {batch}")
                                _take_turn(subject, worker, batch, turn, settings)
    return {
        "machine": machine(_engine.isa(), settings.threads),
        "settings": {"prompt": settings.prompt, "generate": settings.generate, "rounds": settings.rounds},
        "dtype": models[0].dtype,
        "read_gb_per_s": statistics.median(bandwidths) / 1e9,
        "models": report(models, settings, statistics.median(bandwidths)),
    }


def _groups(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """All at once where they fit, else one by one; who does not fit alone has a reason."""
    available = infer.MEMORY_SHARE * memory_of_machine("MemAvailable")
    for subject in subjects:
        need = subject.need_bytes + subject.packing_bytes
        if need > available:
            subject.reason = f"needs {need / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
    fitting = [subject for subject in subjects if not subject.reason]
    packing = max((subject.packing_bytes for subject in fitting), default=0)
    together = sum(subject.need_bytes for subject in fitting) + packing
    return [fitting] if together <= available else [[subject] for subject in fitting]


def _start(
    subject: Subject, folder: Path, settings: Settings, stack: ExitStack, progress: Callable[[str], None]
) -> Worker:
    progress(f"{subject.name}: making weights")
    directory = folder / subject.name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(subject.config))
    worker = stack.enter_context(Worker(infer_contestants.program(OURS), settings.threads))
    load = {"model": str(directory), "dtype": subject.dtype, "threads": settings.threads}
    load |= {"batch": max(settings.batches), "length": settings.length}
    load["options"] = {"load_format": "dummy", "weight_cache": False}  # nothing is written
    try:
        worker.ask("load", **load)
        worker.ask("generate", prompts=_prompts(1, settings.prompt, -1), tokens=2)  # untimed
    except BenchError as error:
        subject.reason = str(error)
        worker.process.kill()
    return worker


def _take_turn(subject: Subject, worker: Worker, batch: int, turn: int, settings: Settings) -> None:
    try:
        prompts = _prompts(batch, settings.prompt, turn)
        times = worker.ask("generate", prompts=prompts, tokens=settings.generate + 1)["times"]
        subject.rates.setdefault(batch, []).append(infer.decode_rate(times))
        subject.rss_bytes = max(subject.rss_bytes or 0, worker.ask("memory")["rss_bytes"])
    except BenchError as error:
        subject.reason = str(error)
        worker.process.kill()


def _prompts(batch: int, tokens: int, seed: int) -> list[list[int]]:
    return infer_contestants.random_prompts(seed, batch, tokens, 0, VOCABULARY)


def report(subjects: Sequence[Subject], settings: Settings, bandwidth: float) -> list[dict[str, Any]]:
    """A dict for each model. `speedup` is the first one's latency over its own."""
    models = []
    for subject in subjects:
        rates = {str(b): statistics.median(subject.rates[b]) for b in settings.batches if subject.rates.get(b)}
        # A step gives every sequence a token.
        latency = {batch: 1e3 * int(batch) / rate for batch, rate in rates.items()}
        base = models[0]["ms_per_token"] if models else latency
        embedding = 0 if subject.config["tie_word_embeddings"] else VOCABULARY * subject.config["hidden_size"]
        read = (subject.active - embedding) * infer_contestants.OUR_BITS[subject.dtype] / 8
        models.append(
            {
                "name": subject.name,
                "parameters": subject.parameters,
                "active_parameters": subject.active,
                "ms_per_token": latency,
                "tokens_per_s": rates,
                "speedup": {batch: base[batch] / ms for batch, ms in latency.items() if batch in base},
                "rss_bytes": subject.rss_bytes,
                "share_of_bandwidth": read * rates["1"] / bandwidth if "1" in rates else None,
                **({"reason": subject.reason} if subject.reason else {}),
            }
        )
    return models
