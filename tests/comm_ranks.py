"""The program that test_comm.py runs as several ranks: `python comm_ranks.py SCENARIO TIMEOUT [ARGUMENT]`."""

import json
import os
import signal
import sys
import time

import numpy as np

from coterie.cli import main
from coterie.distributed import process_group, require_same, this_rank


def part(rank: int, count: int) -> np.ndarray:
    """What a rank brings: values of many magnitudes, so that sums in another order have other bits."""
    random = np.random.default_rng(rank)
    return (random.standard_normal(count) * 10.0 ** random.integers(-4, 4, count)).astype(np.float32)


def block(source: int, target: int, round: int) -> np.ndarray:
    """What a rank has for another one; often nothing."""
    size = max(0, (source * 7 + target * 3 + round * 5) % 11 - 3) * (1 if round % 2 else 40_001)
    return np.random.default_rng((source, target, round)).integers(0, 256, size, np.uint8)


def sum_in_rank_order(ranks: list[int], count: int) -> np.ndarray:
    total = part(ranks[0], count)
    for rank in ranks[1:]:
        total = total + part(rank, count)
    return total


def check_reductions(group, ranks: list[int]) -> None:
    me = ranks[group.rank]
    for count in (0, 1, 1000, 300_001):
        array = part(me, count)
        group.all_reduce(array, label="sum")
        assert array.tobytes() == sum_in_rank_order(ranks, count).tobytes()
        array = part(me, count)
        group.all_reduce(array, "max")
        assert (array == np.max([part(rank, count) for rank in ranks], axis=0)).all()
    count = 5003
    share = np.zeros(count, np.float32)
    group.reduce_scatter(part(me, count * group.size), share)
    expected = sum_in_rank_order(ranks, count * group.size)[count * group.rank :][:count]
    assert share.tobytes() == expected.tobytes()
    # bf16: exact in fp32, since the values are small whole numbers.
    bits = (np.full(3000, me + 1, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    group.all_reduce(bits)
    assert ((bits.astype(np.uint32) << 16).view(np.float32) == sum(rank + 1 for rank in ranks)).all()
    whole = np.array([2**40 + me, -me], np.int64)
    group.all_reduce(whole)
    assert whole.tolist() == [2**40 * group.size + sum(ranks), -sum(ranks)]


def check_movements(group, ranks: list[int]) -> None:
    me = ranks[group.rank]
    for size in (0, 1, 100_003):
        everything = np.zeros((group.size, size), np.float32)
        group.all_gather(part(me, size), everything, "gather")
        assert (everything == np.stack([part(rank, size) for rank in ranks])).all()
    for root in range(group.size):
        array = part(me, 70_001)
        group.broadcast(array, root)
        assert (array == part(ranks[root], 70_001)).all()
    for round in range(6):
        sent = [block(me, peer, round) for peer in ranks]
        expected = [block(peer, me, round) for peer in ranks]
        received = np.zeros(sum(map(len, expected)), np.uint8)
        group.all_to_all_v(np.concatenate(sent), [len(b) for b in sent], received, [len(b) for b in expected])
        assert (received == np.concatenate(expected)).all(), round
    group.barrier("between")


def operations(group, argument: str) -> None:
    """Everything, on the world and on groups that overlap."""
    here = this_rank()
    assert (group.rank, group.size, group.name) == (here.rank, here.size, "world")
    everybody = list(range(group.size))
    check_reductions(group, everybody)
    check_movements(group, everybody)
    halves = group.split(group.rank % 2, -group.rank, "half")
    ranks = [rank for rank in reversed(everybody) if rank % 2 == group.rank % 2]
    assert [halves.world_rank(i) for i in range(halves.size)] == ranks
    check_reductions(halves, ranks)
    check_movements(halves, ranks)
    backwards = group.subgroup(everybody[::-1], "backwards")
    check_movements(backwards, everybody[::-1])
    assert (group.subgroup([0], "first") is None) == (group.rank != 0)
    if group.rank == 0:
        print(json.dumps({"backend": group.backend, "size": group.size, "threads": os.environ["OMP_NUM_THREADS"]}))


def stop_at_step_3(group, how: str) -> None:
    array = np.zeros(100_000, np.float32)
    for step in range(6):
        if step == 3 and group.rank == 1:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raise":
                raise ZeroDivisionError("planted")
            time.sleep(60)
        group.all_reduce(array, label=f"layer {step} gradients")


def compare(group, argument: str) -> None:
    require_same(group, f"seed = {3 if group.rank == 2 else 0}", "configuration")


def uneven(group, argument: str) -> None:
    """A broken program: the two sides of a message differ in length."""
    size = 8 if group.rank == 0 else 16
    group.all_gather(np.zeros(size, np.uint8), np.zeros(size * group.size, np.uint8), "planted")


def once(group, marker: str) -> None:
    """Killed in the first run, well in the second."""
    if group.rank == 1 and not os.path.exists(marker):
        with open(marker, "w"):
            os.kill(os.getpid(), signal.SIGKILL)
    group.barrier("after the restart")


SCENARIOS = {"operations": operations, "stop": stop_at_step_3, "compare": compare, "uneven": uneven, "once": once}

if __name__ == "__main__":
    scenario, timeout, argument = SCENARIOS[sys.argv[1]], float(sys.argv[2]), "".join(sys.argv[3:])

    def command() -> None:
        with process_group(timeout) as group:
            scenario(group, argument)

    # Errors become lines and exit codes where the command does it.
    import coterie.cli

    coterie.cli.app.registered_commands.clear()
    coterie.cli.app.command("run")(command)
    sys.exit(main(["run"]))
