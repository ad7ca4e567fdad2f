"""What training on several ranks survives: ranks that are killed, stall, are told other things or can't be reached.

Every run that was disturbed ends with the losses of one that was not, bit for bit."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coterie.training import read_metrics

STEPS, BATCH, SEQUENCE = 200, 4, 32
TIMEOUT_S = 6  # of the ranks
CONFIG = f"""
[model]
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 96
num_experts = [0, 4]
initializer_range = 0.1
[data]
path = "data"
sequence_length = {SEQUENCE}
[train]
output_dir = "undisturbed"
tokens = {STEPS * BATCH * SEQUENCE}
batch_size = {BATCH}
learning_rate = 3e-3
save_every = 2
threads = 1
[parallel]
zero_stage = 2
timeout_s = {TIMEOUT_S}
"""
KILLS = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data, a configuration and an undisturbed run of two ranks."""
    place = tmp_path_factory.mktemp("failures")
    (place / "text").mkdir()
    for n in range(4):
        words = [f"word{(i * i + i // 7 + n) % 97}" for i in range(1500)]
        (place / "text" / f"{n}.txt").write_text(" ".join(words))
    (place / "tiny.toml").write_text(CONFIG)
    data = ("data", "text", "--out", "data", "--vocab-size", "300", "--valid-fraction", "0.1")
    for arguments in (data, train()):
        done = subprocess.run(command(*arguments), cwd=place, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    return place


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "coterie", *arguments]


def train(*options: str, output_dir: str = "undisturbed", ranks: int | None = 2) -> list[str]:
    launched = [f"--ranks={ranks}"] if ranks else []
    return ["train", "tiny.toml", f"--set=train.output_dir={output_dir}", *launched, *options]


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(row["step"], row["kind"], row["loss"]) for row in read_metrics(run)]


def steps_done(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0


def wait_for(condition, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def pids_of_ranks(output_dir: str) -> list[int]:
    """Processes that are ranks of this run, and not their launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdecimal() and output_dir.encode() in (entry / "cmdline").read_bytes()
            if is_ours and re.search(rb"(^|\0)(OMPI_COMM_WORLD_)?RANK=", (entry / "environ").read_bytes()):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended
    return found


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def start(place: Path, *options: str, output_dir: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*train(*options, output_dir=output_dir)),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def disturb(process: subprocess.Popen, run: Path, victim: str, chance: random.Random) -> None:
    """Waits until training has gone on for some steps, and kills a rank, or all of them; or all while they save."""
    wanted = steps_done(run) + chance.randint(1, 5)
    wait_for(lambda: steps_done(run) >= wanted or process.poll() is not None)
    time.sleep(chance.uniform(0, 0.05))
    if victim == "save":
        wait_for(lambda: any((run / "checkpoints").glob("tmp-*")) or process.poll() is not None)
    ranks = pids_of_ranks(run.name)
    kill([chance.choice(ranks)] if ranks and victim == "rank" else ranks)


@pytest.mark.parametrize("launcher", ["mpi", "torchrun"])
def test_kills_at_random_moments_change_nothing(place: Path, launcher: str) -> None:
    output_dir = f"killed-{launcher}"
    run, chance = place / output_dir, random.Random(launcher)
    for victim in itertools.islice(itertools.cycle(["rank", "all", "save"]), KILLS // 2):
        resume = ["--resume"] * (run / "checkpoints").is_dir()
        process = start(place, *resume, f"--launcher={launcher}", "--max-restarts=0", output_dir=output_dir)
        disturb(process, run, victim, chance)
        _, said = process.communicate(timeout=60)
        assert process.returncode not in (0, 2), said  # neither at the end, nor refused to load what is there
        assert "Traceback" not in said
    last = command(*train("--resume", output_dir=output_dir))
    done = subprocess.run(last, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(place / "undisturbed")


@pytest.mark.parametrize("launcher", ["mpi", "torchrun"])
def test_a_run_goes_on_by_itself_after_a_rank_was_killed(place: Path, launcher: str) -> None:
    output_dir = f"restarted-{launcher}"
    process = start(place, f"--launcher={launcher}", output_dir=output_dir)
    wait_for(lambda: steps_done(place / output_dir) > 5)
    kill(pids_of_ranks(output_dir)[-1:])
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "was killed by signal 9 (SIGKILL); the others were stopped\ncoterie: starting again (1 of 3)\n" in said
    assert losses(place / output_dir) == losses(place / "undisturbed")


def test_a_stalled_rank_is_named_within_the_timeout(place: Path) -> None:
    process = start(place, "--launcher=mpi", output_dir="stalled")
    wait_for(lambda: steps_done(place / "stalled") > 5)
    ranks = pids_of_ranks("stalled")
    last = max(ranks, key=lambda pid: int(environment_of(pid)["OMPI_COMM_WORLD_RANK"]))
    kill([last], signal.SIGSTOP)
    stopped_at = time.monotonic()
    line = process.stderr.readline()
    while not line.startswith("coterie: rank 0"):
        line = process.stderr.readline()
    assert time.monotonic() - stopped_at < TIMEOUT_S + 5
    operation = r"\w+ '[^']+'"  # what for: "layer 1 dispatch", "gradients of model.layers.1.router.weight and others"
    assert re.fullmatch(rf"coterie: rank 0, group [\w ]+: {operation}: rank 1 did not arrive within 6.0 s\n", line), (
        line
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert losses(place / "stalled") == losses(place / "undisturbed")


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


def separate_ranks(place: Path, options_of_rank: list[list[str]], prefixes: list[list[str]], **more: str) -> list:
    port = str(20_000 + os.getpid() % 10_000)
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", **more}
    return [
        subprocess.Popen(
            [*prefixes[rank], *command(*train(*options_of_rank[rank], output_dir="separate", ranks=None))],
            cwd=place,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_rank_with_another_configuration_is_refused(place: Path) -> None:
    ranks = separate_ranks(place, [[], ["--set=train.learning_rate=1e-3"]], [[], []])
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "coterie: rank 1 runs another configuration than rank 0 (hash " in said[0]
    assert not (place / "separate").exists()


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with one link between them: 10.77.0.1 on link0, 10.77.0.2 on link1."""
    if shutil.which("ip") is None or ip("netns", "add", "coterie0").returncode != 0:
        pytest.skip("this machine does not let us make network namespaces")
    try:
        made = [ip("netns", "add", "coterie1")]
        made.append(
            ip("link", "add", "link0", "netns", "coterie0", "type", "veth", "peer", "link1", "netns", "coterie1")
        )
        for n in (0, 1):
            host = ("-n", f"coterie{n}")
            made.append(ip(*host, "addr", "add", f"10.77.0.{n + 1}/24", "dev", f"link{n}"))
            made += [ip(*host, "link", "set", device, "up") for device in ("lo", f"link{n}")]
        if any(done.returncode for done in made):
            pytest.skip(f"this machine does not let us link network namespaces: {made[-1].stderr}")
        yield ["coterie0", "coterie1"]
    finally:
        for name in ("coterie0", "coterie1"):
            ip("netns", "del", name)


def test_a_link_that_is_cut_stops_both_hosts_and_training_recovers(place: Path, hosts: list[str]) -> None:
    def start_hosts(*options: str) -> list[subprocess.Popen]:
        prefixes = [["ip", "netns", "exec", host, "env", f"GLOO_SOCKET_IFNAME=link{n}"] for n, host in enumerate(hosts)]
        return separate_ranks(place, [list(options)] * 2, prefixes, MASTER_ADDR="10.77.0.1")

    ranks = start_hosts()
    wait_for(lambda: steps_done(place / "separate") > 5)
    ip("-n", hosts[0], "link", "set", "link0", "down")
    cut_at = time.monotonic()
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert time.monotonic() - cut_at < 2 * TIMEOUT_S + 5
    assert [rank.returncode for rank in ranks] == [3, 3], said
    for n, text in enumerate(said):
        assert re.search(rf"^coterie: rank {n}, group [\w ]+: \w+ '[^']+': rank {1 - n} ", text, re.MULTILINE), text
    ip("-n", hosts[0], "link", "set", "link0", "up")
    ranks = start_hosts("--resume")
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert losses(place / "separate") == losses(place / "undisturbed")
