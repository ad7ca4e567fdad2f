"""What `coterie bench infer` does: a model served by us and by its peers, on one machine in one run.

As in training.py every system is a process of its own and they take turns: in each round every test is done by one
system after the other, while the others sleep, and the bandwidth of reading memory in huge pages is measured beside it.
Systems (infer_contestants.py) that don't fit into memory together are measured in groups; ours is in each. Nothing here
imports torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from coterie.benchmarks.infer_contestants import PREFILL, Contestant, Model, Settings
from coterie.benchmarks.worker import READ_BYTES, BenchError, Worker, machine, memory_of_machine

FIRST_PROMPT = 8  # tokens; it is the start that counts
PASSES = 3  # of a turn, over the systems that need no longer than this for a test
SHORT_TEST_S = 10.0
STARTS = 3  # in a turn, of systems that are there within
SHORT_START_S = 5.0
LIKE_MEMORY = 1.15  # two turns are compared where what could be read around them differed by this factor at most
MORE_PASSES = 3  # at most, of a test of decoding, until there are such turns
WORTH_REPEATING = 0.85  # of a peer's best variant; slower ones run a test in the first round alone
MEMORY_SHARE = 0.85  # of what is available, for the systems of a group


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
        machine, settings and rows, as docs/serving-performance.md describes them.
    """
    from coterie import _engine

    limits = _engine.Limits(settings.threads, READ_BYTES)
    rows = []
    for dtype, all_of_row in field_of.items():
        _measure(model, all_of_row, settings, limits, lambda what, d=dtype: progress(f"{d}: {what}"))
        rows.append(report(model, dtype, all_of_row, settings))
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
) -> None:
    """All rounds of a row."""
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
                    again = [(c, w) for c, w in live if turn == 0 or _worth_repeating(c, test, all_of_row)]
                    for number in range(PASSES):
                        first = (turn + number) % max(1, len(again))  # nobody always follows the same neighbour
                        again = _take_pass(
                            model, again[first:] + again[:first], test, settings, next(seeds), limits, progress
                        )
                    for _ in range(MORE_PASSES if test != PREFILL else 0):
                        if not (again := _not_compared(live, test, all_of_row)):
                            break
                        _take_pass(model, again, test, settings, next(seeds), limits, progress)
                for contestant, worker in live:
                    _note_memory(contestant, worker)
            for turn_of_starts in range(STARTS):
                for contestant in group:
                    _take_starts(model, contestant, settings, turn_of_starts > 0, progress)


def _take_pass(
    model: Model,
    live: Sequence[tuple[Contestant, Worker]],
    test: str,
    settings: Settings,
    seed: int,
    limits: Any,
    progress: Callable[[str], None],
) -> list[tuple[Contestant, Worker]]:
    """A test by one system after the other; returns those that were quick."""
    quick = []
    for contestant, worker in live:
        progress(f"{contestant.name}: {test if test == PREFILL else 'batch ' + test}")
        before, start = limits.read_bandwidth(), time.perf_counter()
        _take_turn(model, contestant, worker, test, settings, seed)
        seconds = time.perf_counter() - start
        if contestant.reason:
            continue
        contestant.bandwidths.setdefault(test, []).append((before + limits.read_bandwidth()) / 2)
        if seconds <= SHORT_TEST_S:
            quick.append((contestant, worker))
    return quick


def _not_compared(
    live: Sequence[tuple[Contestant, Worker]], test: str, all_of_row: Sequence[Contestant]
) -> list[tuple[Contestant, Worker]]:
    """Ours, and those that had no turn with memory like ours; nobody where there are none."""
    ours = all_of_row[0]
    rest = [
        (contestant, worker)
        for contestant, worker in live
        if contestant is not ours
        and contestant.rate(test)
        and _worth_repeating(contestant, test, all_of_row)
        and not compared_turns(ours, contestant, test)
    ]
    us = [(contestant, worker) for contestant, worker in live if contestant is ours and ours.rate(test)]
    return us + rest if us and rest else []


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


def _take_starts(
    model: Model, contestant: Contestant, settings: Settings, again: bool, progress: Callable[[str], None]
) -> None:
    """Of a system that is alone: the mapped start; where starts are short, which scatter and cost little, both kinds
    again and again."""
    if contestant.reason:
        return
    short = min(contestant.first_token_s) <= SHORT_START_S
    if contestant.mmap is not None and (short or not again):
        progress(f"{contestant.name}: mapped start")
        seconds = _first_token(model, contestant, settings, contestant.mmap)
        contestant.first_token_mmap_s += [] if seconds is None else [seconds]
    if short:
        progress(f"{contestant.name}: start")
        seconds = _first_token(model, contestant, settings, contestant.load["options"])
        contestant.first_token_s += [] if seconds is None else [seconds]


def _take_turn(model: Model, contestant: Contestant, worker: Worker, test: str, settings: Settings, seed: int) -> None:
    if contestant.reason:
        return
    rates = contestant.rates.setdefault(test, [])
    try:
        if test == PREFILL:
            answer = worker.ask("generate", prompts=model.prompts(1000 * seed, 1, settings.prompt), tokens=1)
            rates.append(settings.prompt / answer["times"][0][0])
            contestant.first_ids[1000 * seed] = answer["token_ids"][0][0]
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


def report(model: Model, dtype: str, all_of_row: Sequence[Contestant], settings: Settings) -> dict[str, Any]:
    """A row; its ratios of prefill want all rows, see `add_prefill_ratios`."""
    ours = all_of_row[0]
    by_peer: dict[str, list[Contestant]] = {}
    for contestant in all_of_row[1:]:
        by_peer.setdefault(contestant.peer, []).append(contestant)
    peers = {name: _figures(model, variants, settings) for name, variants in by_peer.items()}
    for name, variants in by_peer.items():
        peers[name]["same_first_token"] = _agreement(ours, variants)
    row = {"dtype": dtype, **_figures(model, [ours], settings)}
    row["peers"] = peers
    at_equal_bits = {name: peer for name, peer in peers.items() if not name.startswith("llama_cpp_")}
    row["ratio_prefill"] = None
    rivals = [contestant for contestant in all_of_row[1:] if contestant.peer in at_equal_bits]
    row["ratio_decode"] = {str(batch): decode_ratio(ours, rivals, str(batch)) for batch in settings.batches}
    if len(at_equal_bits) < len(peers):
        any_type = {str(batch): decode_ratio(ours, all_of_row[1:], str(batch)) for batch in settings.batches}
        row["ratio_decode_any_type"] = any_type
    return row


def compared_turns(ours: Contestant, theirs: Contestant, batch: str) -> list[float]:
    """Ratios of our rates to theirs, of turns around which memory was alike: decoding is as fast as memory is, and on a
    shared machine that changes by a factor of two."""
    return [
        rate / other
        for rate, read in ours.samples(batch)
        for other, read_by_others in theirs.samples(batch)
        if max(read, read_by_others) <= LIKE_MEMORY * min(read, read_by_others)
    ]


def decode_ratio(ours: Contestant, rivals: Sequence[Contestant], batch: str) -> float | None:
    """To the best of the rivals: the median of the compared turns, or, where there are none, of medians."""
    rate = ours.rate(batch)
    ratios = [
        statistics.median(compared_turns(ours, rival, batch) or [rate / their_rate])
        for rival in rivals
        if rate and (their_rate := rival.rate(batch))
    ]
    return min(ratios, default=None)


def add_prefill_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """To the fastest peer: of weights in few bits the fastest at any."""
    everyone = [peer for row in rows for peer in row["peers"].values()]
    for row in rows:
        rivals = everyone if row["dtype"].startswith("int") else row["peers"].values()
        row["ratio_prefill"] = _ratio(row["prefill_tokens_per_s"], (peer["prefill_tokens_per_s"] for peer in rivals))


def _figures(model: Model, variants: Sequence[Contestant], settings: Settings) -> dict[str, Any]:
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
        "read_gb_per_s": {test: _gigabytes(best[test].bandwidth(test)) for test in settings.tests},
        "samples": {test: best[test].samples(test) for test in settings.tests},
        "share_of_bandwidth": None,
    }
    if decode.get("1"):
        figures["share_of_bandwidth"] = _read_bytes(model, best["1"], settings) * best["1"].share_of_read("1")
    figures["version"] = next((variant.version for variant in variants if variant.version), None)
    if len(variants) > 1:
        figures["best_variant"] = {test: variant.variant for test, variant in best.items() if variant.rate(test)}
        figures["variants"] = {v.variant: {test: v.rate(test) for test in settings.tests} for v in variants}
    reasons = {variant.name: variant.reason for variant in variants if variant.reason}
    return figures | ({"reasons": reasons} if reasons else {})


def _gigabytes(rate: float | None) -> float | None:
    return None if rate is None else rate / 1e9


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


def _ratio(ours: float | None, theirs: Iterable[float | None]) -> float | None:
    best = max((rate for rate in theirs if rate), default=None)
    return ours / best if ours and best else None
