"""Layers and training steps, ours and its peers, on one machine in one run.

A shared machine changes from minute to minute, so figures of different runs say nothing about each other.
Here every system is a process of its own (benches/peers, one file a system), all of them hold the same layer
at the same time, and they take turns: in each round every system runs a few steps, while the others sleep.
What the machine can do at most (arithmetic on registers alone, reading memory in huge pages) is measured in
the same rounds. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes.util
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from coterie.benchmarks.cells import Cell
from coterie.benchmarks.worker import OURS, READ_BYTES, ROOT, BenchError, System, Worker, machine, memory_of_machine
from coterie.distributed import choose_launcher, launch_command

PEERS = {
    "layer": ("deepspeed", "torch_loop", "torch_grouped_mm", "transformers"),
    "linear": ("torch",),
    "step": ("deepspeed", "torch"),
    "train": ("deepspeed", "ddp", "fsdp2"),
}
# Ours at other settings, beside the peers of a kind: what they set in the environment, and whether they are one rank.
VARIANTS = {
    "layer": {"coterie_unpacked": {"BENCH_PACKED": "0"}},  # of forward passes alone
    "train": {"coterie_zero0": {"BENCH_ZERO_STAGE": "0"}, "coterie_one_rank": {}},
}
PACKAGES = {"deepspeed": "deepspeed", "transformers": "transformers"}  # of the peers that need more than torch
TCMALLOC = "tcmalloc"
SHARES = ("share_of_peak", "share_of_bandwidth", "share_of_limit")  # the last two of forward passes alone
MOST_COPIES = 64
MOST_BATCHES = 61  # prime, so that inputs and copies of the layer meet in every combination


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Parameters
    ----------
    threads
        Of every system, and of the limits.
    rounds
        How many turns each system gets.
    repeat
        The least number of steps in a turn.
    seconds
        The least duration of a turn.
    """

    threads: int = 2
    rounds: int = 5
    repeat: int = 3
    seconds: float = 0.1


@dataclass
class Samples:
    """What one system did in one cell."""

    times_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None  # why there are no figures

    def summary(self, cell: Cell, peak: float, bandwidth: float) -> dict[str, Any]:
        """Of this system; `peak` in FLOP/s and `bandwidth` in bytes/s are the machine's."""
        if self.reason or not self.times_ms:
            return {"ms": None, "reason": self.reason}
        ms = statistics.median(self.times_ms)
        arithmetic_ms = 1e3 * cell.flops / peak
        result = {
            "ms": ms,
            "min_ms": min(self.times_ms),
            "steps": len(self.times_ms),
            "gflops": cell.flops / ms / 1e6,
            "tokens_per_s": 1e3 * cell.tokens / ms,
            "share_of_peak": arithmetic_ms / ms,
            "peak_bytes": self.peak_bytes,
        }
        if not cell.backward:  # it takes at least as long as its arithmetic, and as reading its weights once
            read_ms = 1e3 * cell.read_bytes(self.info) / bandwidth
            result |= {"share_of_bandwidth": read_ms / ms, "share_of_limit": max(read_ms, arithmetic_ms) / ms}
        return result | {key: value for key, value in self.info.items() if key != "norms"}


class Limits:
    """What the machine can do at most; the best that was seen since `begin`."""

    def __init__(self, threads: int) -> None:
        from coterie import _engine

        self.source = _engine.Limits(threads, READ_BYTES)
        self.isa = _engine.isa()
        self.begin("fp32")

    def begin(self, dtype: str) -> None:
        self.dtype, self.flops, self.bandwidth = dtype, 0.0, 0.0

    def measure(self) -> None:
        self.flops = max(self.flops, self.source.register_flops(self.dtype))
        self.bandwidth = max(self.bandwidth, self.source.read_bandwidth())


def systems(kind: str, peers: Sequence[str], ranks: int = 1, backward: bool = True) -> list[System]:
    """Ours, its variants, and the named peers.

    Parameters
    ----------
    kind
        One of `PEERS`.
    backward
        Whether they run backward passes, too.
    peers
        Names of `PEERS[kind]`, each with or without "+tcmalloc".
    ranks
        Processes of each system; ours over MPI where that is installed, else as the peers by torchrun.

    Raises
    ------
    BenchError
        An unknown name, or something that is not installed.
    """
    folder = ROOT / "benches" / "peers"
    if not folder.is_dir():
        raise BenchError(f"{folder}: missing; the benchmarks run from a checkout of Coterie")
    python = ROOT / ".venv-peers" / "bin" / "python"
    interpreter = str(python) if python.exists() else sys.executable
    program, path = str(folder / f"{OURS}_peer.py"), {"PYTHONPATH": str(ROOT / "python")}
    found = [_ranked(OURS, sys.executable, program, path, ranks, choose_launcher() if ranks > 1 else "")]
    variants = {} if kind == "layer" and backward else VARIANTS.get(kind, {})
    for name, environment in variants.items():
        alone = name.endswith("one_rank")
        threads = {"OMP_NUM_THREADS": str(ranks), "BENCH_THREADS": str(ranks)} if alone else {}
        launcher = "" if alone or ranks == 1 else choose_launcher()
        found.append(_ranked(name, sys.executable, program, path | environment | threads, ranks, launcher))
    for peer in dict.fromkeys(peers):
        name, _, allocator = peer.partition("+")
        if name not in PEERS[kind] or allocator not in ("", TCMALLOC):
            known = ", ".join(PEERS[kind])
            raise BenchError(f"--peers: no peer is called {peer!r}; known: {known}, each also with +{TCMALLOC}")
        _require(interpreter, PACKAGES.get(name, "torch"), name)
        environment = {"LD_PRELOAD": _tcmalloc(peer)} if allocator else {}
        program = str(folder / f"{name}_peer.py")
        found.append(_ranked(peer, interpreter, program, environment, ranks, "torchrun" if kind == "train" else ""))
    return found


def _ranked(
    name: str, interpreter: str, program: str, environment: dict[str, str], ranks: int, launcher: str
) -> System:
    """A system as one process, or as ranks that a launcher starts."""
    if not launcher:
        return System(name, [interpreter, program], environment)
    command, more = launch_command(launcher, ranks, interpreter)
    return System(name, [*command, program], {**environment, **more})


def _require(interpreter: str, package: str, peer: str) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    if subprocess.run([interpreter, "-c", code, package], capture_output=True).returncode != 0:
        raise BenchError(f"--peers: {peer}: {interpreter} has no {package}; run benches/peers/setup")


def _tcmalloc(peer: str) -> str:
    library = ctypes.util.find_library("tcmalloc_minimal")
    if not library:
        raise BenchError(f"--peers: {peer}: libtcmalloc_minimal is not installed; run benches/peers/setup")
    return library


def run(
    cells: Sequence[Cell],
    contestants: Sequence[System],
    settings: Settings,
    progress: Callable[[Cell, str], None] = lambda cell, system: None,
) -> dict[str, Any]:
    """Measure every cell.

    Parameters
    ----------
    cells
        What to measure.
    contestants
        From `systems`.
    settings
        How to measure it.
    progress
        Called before every turn of a system.

    Returns
    -------
    dict
        machine, cells and summary, as docs/performance.md describes them.
    """
    for cell in cells:
        cell.check()
    limits = Limits(settings.threads * max(getattr(cell, "ranks", 1) for cell in cells))
    measured = [measure(cell, contestants, settings, limits, progress) for cell in cells]
    return {
        "machine": machine(limits.isa, settings.threads),
        "settings": asdict(settings),
        "cells": measured,
        "summary": summarize(measured),
    }


def measure(
    cell: Cell,
    contestants: Sequence[System],
    settings: Settings,
    limits: Limits,
    progress: Callable[[Cell, str], None],
) -> dict[str, Any]:
    """One cell: all systems in turns, round by round."""
    samples = {system.name: Samples() for system in contestants}
    request = _request(cell, settings)
    limits.begin(cell.dtype)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(system, settings.threads)) for system in contestants]
        together = _fit_together(cell, request["copies"], len(workers))
        for turn in range(settings.rounds):
            limits.measure()
            first = turn % len(workers)  # nobody always follows the same neighbour
            for worker in workers[first:] + workers[:first]:
                progress(cell, worker.name)
                _take_turn(worker, request, settings, samples[worker.name], together)
        limits.measure()
    return report(cell, samples, limits.flops, limits.bandwidth)


def _take_turn(worker: Worker, request: dict[str, Any], settings: Settings, samples: Samples, together: bool) -> None:
    if samples.reason:
        return
    try:
        if not samples.times_ms or not together:
            samples.info = worker.ask("make", cell=request)["info"]
        answer = worker.ask("run", repeat=settings.repeat, seconds=settings.seconds)
        if not together:
            worker.ask("drop")
    except BenchError as error:
        samples.reason = str(error)
        worker.process.kill()  # its memory is for the others
        return
    samples.times_ms += answer["ms"]
    samples.peak_bytes = max(samples.peak_bytes, answer["peak_bytes"])


def _request(cell: Cell, settings: Settings) -> dict[str, Any]:
    """What a system needs to know of a cell. Forward passes go through many layers, as a model does that
    serves; training repeats one, since its weights and gradients change places with all others anyway."""
    copies = 1 if cell.backward else min(MOST_COPIES, math.ceil(READ_BYTES / cell.weight_bytes))
    batches = 1 if cell.backward else max(1, min(MOST_BATCHES, 8192 // cell.tokens))
    return {"kind": cell.kind, **asdict(cell), "threads": settings.threads, "copies": copies, "batches": batches}


def _fit_together(cell: Cell, copies: int, num_systems: int) -> bool:
    """Whether all systems can hold the cell at once; otherwise each builds it anew for every turn."""
    gradients = 3 if cell.backward else 1  # weights, gradients, and gradients on their way
    need = num_systems * (copies * cell.weight_bytes * gradients + cell.activation_bytes)
    if not cell.backward:
        need += copies * cell.weight_bytes  # ours has them packed, too
    return need < 0.8 * memory_of_machine("MemAvailable")


def report(cell: Cell, samples: dict[str, Samples], peak: float, bandwidth: float) -> dict[str, Any]:
    """The figures of one cell.

    Parameters
    ----------
    cell
        What was measured.
    samples
        By the name of the system.
    peak, bandwidth
        The limits of the same rounds, FLOP/s and bytes/s.
    """
    systems = {name: sample.summary(cell, peak, bandwidth) for name, sample in samples.items()}
    ours, peers = systems[OURS], {name: system for name, system in systems.items() if not name.startswith(OURS)}
    ran = [name for name, peer in peers.items() if peer["ms"] is not None]
    best = min(ran, key=lambda name: peers[name]["ms"], default=None)
    result = {
        **asdict(cell),
        "peak_gflops": peak / 1e9,
        "read_gb_per_s": bandwidth / 1e9,
        "ours_ms": ours["ms"],
        "ours_gflops": ours.get("gflops"),
        **{share: ours[share] for share in SHARES if share in ours},
        "peers": {name: peer["ms"] for name, peer in peers.items()},
        "best_peer": best,
        "ratio_to_best_peer": None,
        "ratio_of_minima": None,
    }
    if ours["ms"] is not None and ran:
        result["ratio_to_best_peer"] = peers[best]["ms"] / ours["ms"]
        result["ratio_of_minima"] = min(peers[name]["min_ms"] for name in ran) / ours["min_ms"]
    _compare_results(samples, peers)
    return {**result, "systems": systems}


def _compare_results(samples: dict[str, Samples], peers: dict[str, dict[str, Any]]) -> None:
    """Adds to every peer how far the norms of its outputs and gradients are from ours: 0.01 is 1 %. One that
    routes by rules of its own (DeepSpeed) is off by what it drops; anything else would do other work."""
    ours = samples[OURS].info.get("norms")
    for name, peer in peers.items():
        theirs = samples[name].info.get("norms")
        if ours and theirs:
            peer["difference"] = max(abs(theirs[key] / ours[key] - 1) for key in ours)


def summarize(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means and minima over all cells, and over the cells that share a value of an axis.

    Returns
    -------
    list of dict
        group ("all", "dtype=bf16", ...), cells, and for each of the figures its geometric mean and minimum.
    """
    groups: dict[str, list[dict[str, Any]]] = {"all": list(cells)}
    for axis in ("dtype", "tokens", "experts", "top_k"):
        values = dict.fromkeys(cell[axis] for cell in cells if axis in cell)
        if len(values) > 1:
            groups |= {f"{axis}={value}": [cell for cell in cells if cell[axis] == value] for value in values}
    return [{"group": name, "cells": len(group), **_means(group)} for name, group in groups.items()]


def _means(group: Sequence[dict[str, Any]]) -> dict[str, float]:
    means = {}
    for figure in ("ratio_to_best_peer", "ratio_of_minima", *SHARES):
        values = [cell[figure] for cell in group if cell.get(figure) is not None]
        if values:
            means[f"{figure}_mean"] = statistics.geometric_mean(values)
            means[f"{figure}_min"] = min(values)
    return means
