"""How fast ranks on this machine exchange and add: `coterie bench comm`.

`python -m coterie.benchmarks.comm RESULT.json` is what each rank runs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.benchmarks.worker import BenchError
from coterie.distributed import launch, process_group

OPERATIONS = ("all_to_all", "all_reduce")
SIZES = {1024: 2000, 256 * 1024: 300, 16 * 1024 * 1024: 20}  # bytes: how often, in a turn
TURNS = 3


def measure(ranks: int, launchers: Sequence[str]) -> dict[str, Any]:
    """Every operation and size over every launcher, in turns.

    Parameters
    ----------
    ranks
        On this machine.
    launchers
        "mpi", "torchrun".

    Returns
    -------
    dict
        ranks, cpus, and results: of each operation, size and backend the least of the turns' medians. bytes: what a
        rank sends to the others together (all_to_all), or the vector's size (all_reduce); gb_per_s: bytes over time.
    """
    if ranks < 2:
        raise BenchError(f"--ranks: an exchange needs at least 2 ({ranks})")
    best: dict[tuple[str, str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TURNS):
            for launcher in launchers:
                result = Path(folder) / "result.json"
                if launch(["-m", "coterie.benchmarks.comm", str(result)], ranks, launcher, threads=1) != 0:
                    raise BenchError(f"--launchers: {launcher}: the ranks failed")
                for backend, operation, size, seconds in json.loads(result.read_text()):
                    key = (backend, operation, size)
                    best[key] = min(best.get(key, seconds), seconds)
    results = [
        {"backend": backend, "operation": operation, "bytes": size, "us": 1e6 * s, "gb_per_s": size / s / 1e9}
        for (backend, operation, size), s in best.items()
    ]
    return {"ranks": ranks, "cpus": len(os.sched_getaffinity(0)), "results": results}


def _run_rank(result: Path) -> None:
    with process_group(timeout_s=120) as group:
        rows = [
            (group.backend, operation, size, group.measure(operation, size, rounds))
            for operation in OPERATIONS
            for size, rounds in SIZES.items()
        ]
        if group.rank == 0:
            result.write_text(json.dumps(rows))


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]))
