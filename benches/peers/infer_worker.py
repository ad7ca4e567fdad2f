"""One system under test of `coterie bench infer`, as a process that it speaks to: what all systems share.

A system is a file infer_NAME.py beside this one. It defines how a model is loaded and continued, and calls `serve`.
One JSON object a line; requests come on stdin, each is answered by one line on stdout:

    {"do": "load", "model": PATH, "dtype": "bf16", "threads": 2, "batch": 32, "length": 640, "options": {...}}
                                                       {"version": "..."}    batch, length: the most that will come
    {"do": "generate", "prompts": [[ids], ...], "tokens": 129}
                                                       {"times": [[s, ...], ...], "token_ids": [[...], ...]}
    {"do": "memory"}                                   {"rss_bytes": n, "peak_bytes": n}

`times` are seconds since the request began: when each token of each sequence was there. Decoding is greedy, and ends
by its length alone. A request that fails is answered by {"error": "one line"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import IO, Any, Protocol


def _take_stdout() -> IO[str]:
    """Libraries print where they like: from now on that goes to stderr, and stdout is for answers alone."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


ANSWERS = _take_stdout()


class Tokens:
    """What was generated, and when."""

    def __init__(self, num_sequences: int) -> None:
        self.start = time.perf_counter()
        self.times: list[list[float]] = [[] for _ in range(num_sequences)]
        self.token_ids: list[list[int]] = [[] for _ in range(num_sequences)]

    def add(self, sequence: int, token_id: int) -> None:
        self.times[sequence].append(time.perf_counter() - self.start)
        self.token_ids[sequence].append(int(token_id))


class System(Protocol):
    """A loaded model."""

    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens: ...


class Load(Protocol):
    """Loads a model; `options` are those of a variant of this system. Returns it and its version."""

    def __call__(
        self, model: str, dtype: str, threads: int, batch: int, length: int, **options: Any
    ) -> tuple[System, str]: ...


def serve(load: Load) -> None:
    """Answer requests until stdin ends."""
    system: System | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                system, version = load(**request.pop("options"), **request)
                answer = {"version": version}
            elif do == "generate":
                tokens = system.generate(**request)
                answer = {"times": tokens.times, "token_ids": tokens.token_ids}
            else:
                answer = {"rss_bytes": _status_bytes("VmRSS"), "peak_bytes": _status_bytes("VmHWM")}
        except Exception as error:  # whatever a peer raises is its reason, not our end
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        ANSWERS.write(json.dumps(answer) + "\n")


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))
