"""The systems of a benchmark as processes that take turns, and the machine that they run on.

benches/peers has their programs, one file a system, and the protocol that they speak. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[3]  # of the checkout
OURS = "coterie"
# Of every system; who has set it keeps it. OpenMP's threads spin between two pieces of work, by default so long
# that on a machine with other work they take the processors from each other: steps of 3 ms become 300.
ENVIRONMENT = {"GOMP_SPINCOUNT": "20000"}
READ_BYTES = 1 << 30  # of weights that forward passes go through, and of the read limit: more than caches hold


class BenchError(Exception):
    """What was asked for cannot be measured here; one line."""


@dataclass
class System:
    """A program that speaks the protocol of benches/peers/worker.py."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """A system's process. A request that fails raises BenchError with the system's reason."""

    def __init__(self, system: System, threads: int) -> None:
        self.name = system.name
        self.stderr: IO[bytes] = tempfile.TemporaryFile()
        self.directory = tempfile.TemporaryDirectory(prefix="coterie-bench-")
        own = {"OMP_NUM_THREADS": str(threads), "BENCH_SOCKET": f"{self.directory.name}/ranks"}
        self.process = subprocess.Popen(
            system.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env={**ENVIRONMENT, **os.environ, **own, **system.environment},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            with suppress(BrokenPipeError):  # a request that a system ended before
                stream.close()
        self.directory.cleanup()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"ended with code {self.process.wait()}: {self._last_words()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise BenchError(f"said {line[:80]!r} for an answer") from None
        if "error" in answer:
            raise BenchError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


def machine(isa: str, threads: int) -> dict[str, Any]:
    """What the figures belong to."""
    with open("/proc/cpuinfo") as info:
        names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads,
        "isa": isa,
        "memory_bytes": memory_of_machine("MemTotal"),
        "load_1min": os.getloadavg()[0],
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(("OMP_", "GOMP_"))},
    }


def memory_of_machine(name: str) -> int:
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) * 1024 for line in info if line.startswith(name + ":"))
