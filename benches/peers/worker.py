"""One system under test, as a process that `coterie bench` speaks to: what all systems share.

A system is a file NAME_peer.py beside this one. It defines how its layer is built and calls `serve`.
One JSON object a line; requests come on stdin, each is answered by one line on stdout:

    {"do": "make", "cell": {...}}                      {"info": {...}}     builds the layers and warms up
    {"do": "run", "repeat": 3, "seconds": 0.1}         {"ms": [...], "peak_bytes": n}
    {"do": "drop"}                                     {}                  frees what `make` built

A request that fails is answered by {"error": "one line"}. `run` makes at least `repeat` steps and goes on
for `seconds`. A step is a forward pass without gradients, or, with `backward`, a forward and a backward
pass that ends with gradients of the input and of every parameter; like a training loop it begins by
letting the old gradients go. In a cell of kind `step` it is a step of training a whole model, optimizer and all, and in
one of kind `train` the same on several ranks, each a process with its part of the sequences: the first one answers, and
tells the others of every request and every step, so that they sleep while other systems have their turns.

Every system gets the same numbers: they are made here, from the cell's sizes alone. For forward passes of
few tokens one layer would stay in the caches, which the layers of a model do not: then `copies` layers and
`batches` inputs take turns, call by call.

Legend: T tokens, D hidden, F inner size, E experts, K experts per token.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 65521  # random numbers that are repeated to fill weights; a prime, so that no two rows are alike


@dataclass
class Weights:
    """Of one MoE layer; a system that stores them otherwise copies them."""

    router_ED: Tensor  # fp32: a router decides something discrete, in every system
    up_EFD: Tensor
    down_EDF: Tensor


def _take_stdout() -> IO[str]:
    """Libraries print where they like: from now on that goes to stderr, and stdout is for answers alone."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


ANSWERS = _take_stdout()

Build = Callable[[dict[str, Any]], Any]
"""A cell to a module x_TD -> y_TD, or, for the kind `step`, to something with a method step()."""


def weights_of(cell: dict[str, Any]) -> Weights:
    """The weights of a cell of kind `layer`, scaled so that activations keep their size."""
    E, D, F = cell["experts"], cell["hidden"], cell["ffn"]
    dtype = DTYPES[cell["dtype"]]
    return Weights(
        router_ED=_filled((E, D), D**-0.5, torch.float32, seed=1),
        up_EFD=_filled((E, F, D), D**-0.5, dtype, seed=2),
        down_EDF=_filled((E, D, F), F**-0.5, dtype, seed=3),
    )


def route(x_TD: Tensor, router_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router of the systems that bring none: softmax in fp32, then the K largest as they are."""
    scores_TE = nn.functional.linear(x_TD.float(), router_ED.float()).softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    return weights_TK, ids_TK


def linear_weight(cell: dict[str, Any]) -> Tensor:
    """[outputs, hidden], of a cell of kind `linear`."""
    N, D = cell["outputs"], cell["hidden"]
    return _filled((N, D), D**-0.5, DTYPES[cell["dtype"]], seed=4)


def token_batches(cell: dict[str, Any]) -> Iterator[Tensor]:
    """Windows of random tokens, [sequences, sequence + 1], without end."""
    generator = torch.Generator().manual_seed(5)
    shape = (cell["tokens"] // cell["sequence"], cell["sequence"] + 1)
    while True:
        yield torch.randint(cell["vocabulary"], shape, generator=generator)


def rank_and_size() -> tuple[int, int]:
    """Of this process, by torchrun's variables or mpirun's."""
    of_mpi = os.environ.get("OMPI_COMM_WORLD_RANK", "0"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    return int(os.environ.get("RANK", of_mpi[0])), int(os.environ.get("WORLD_SIZE", of_mpi[1]))


def own_batches(cell: dict[str, Any]) -> Iterator[Tensor]:
    """This rank's sequences of token_batches()."""
    rank, size = rank_and_size()
    return (batch.tensor_split(size)[rank] for batch in token_batches(cell))


class Ranks:
    """A line from the first rank to the others. Waiting for it costs nothing, unlike waiting in a collective."""

    def __init__(self) -> None:
        self.rank, size = rank_and_size()
        self.others: list[IO[str]] = []
        if size == 1:
            return
        path = os.environ["BENCH_SOCKET"]
        if self.rank == 0:
            server = socket.socket(socket.AF_UNIX)
            server.bind(path)
            server.listen()
            self.others = [server.accept()[0].makefile("w") for _ in range(size - 1)]
        else:
            connection = socket.socket(socket.AF_UNIX)
            while connection.connect_ex(path) != 0:  # the first one is on its way
                time.sleep(0.01)
            self.lines = connection.makefile("r")

    def tell(self, line: str) -> None:
        for other in self.others:
            other.write(line + "\n")
            other.flush()


def serve(builders: dict[str, Build]) -> None:
    """Answer requests until stdin ends; `builders` are by kind of cell."""
    ranks = Ranks()
    bench = Bench(builders, ranks)
    if ranks.rank > 0:
        for line in ranks.lines:
            request = json.loads(line)
            getattr(bench, request.pop("do"))(**request)
        return
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] != "run":  # its steps are told one by one
            ranks.tell(line.strip())
        try:
            answer = getattr(bench, request.pop("do"))(**request)
        except Exception as error:  # whatever a peer raises is its reason, not our end
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        ANSWERS.write(json.dumps(answer) + "\n")


class Bench:
    """The layers of one cell, and the clock."""

    def __init__(self, builders: dict[str, Build], ranks: Ranks) -> None:
        self.builders = builders
        self.ranks = ranks
        self.idle_bytes = _status_bytes("VmRSS")
        self.drop()

    def make(self, cell: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(cell["threads"])
        torch.manual_seed(0)
        self.backward = cell["backward"]
        info = {"torch": torch.__version__}
        if cell["kind"] in ("step", "train"):
            self.training = self.builders[cell["kind"]](cell)
            self.training.step()
        else:
            info |= self._make_layer(cell)
        gc.collect()
        _forget_peak()  # all this may have needed more than running does
        return {"info": info}

    def _make_layer(self, cell: dict[str, Any]) -> dict[str, Any]:
        self.modules = [self.builders[cell["kind"]](cell).train(self.backward) for _ in range(cell["copies"])]
        shape, dtype = (cell["tokens"], cell["hidden"]), DTYPES[cell["dtype"]]
        self.inputs = [
            _filled(shape, 1.0, dtype, seed=100 + i).requires_grad_(self.backward) for i in range(cell["batches"])
        ]
        self.grad_out = _filled((cell["tokens"], cell.get("outputs", cell["hidden"])), 1.0, dtype, seed=99)
        info: dict[str, Any] = {"norms": self._norms()}
        if cell["kind"] == "layer":
            info["experts_hit"] = self._experts_hit(cell)
        if facts := getattr(self.modules[0], "facts", None):
            info |= facts()
        return info

    def run(self, repeat: int, seconds: float) -> dict[str, Any]:
        self.step()  # the process has slept
        times: list[float] = []
        while len(times) < repeat or sum(times) < seconds:
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return {"ms": [1e3 * t for t in times], "peak_bytes": _status_bytes("VmHWM") - self.idle_bytes}

    def drop(self) -> dict[str, Any]:
        self.training: Any = None
        self.modules: list[nn.Module] = []
        self.inputs: list[Tensor] = []
        self.grad_out = torch.empty(0)
        self.calls = 0
        gc.collect()
        return {}

    def step(self) -> None:
        self.ranks.tell('{"do": "step"}')
        self._step()

    def _step(self) -> Tensor | None:
        if self.training is not None:
            return self.training.step()
        module = self.modules[self.calls % len(self.modules)]
        x = self.inputs[self.calls % len(self.inputs)]
        self.calls += 1
        if not self.backward:
            with torch.no_grad():
                return module(x)
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x)
        y.backward(self.grad_out)
        return y.detach()

    def _norms(self) -> dict[str, float]:
        """Of what the first step computes, to see that all systems compute the same."""
        norms = {"output": self._step().norm(dtype=torch.float64).item()}
        if self.backward:
            norms["grad_input"] = self.inputs[0].grad.norm(dtype=torch.float64).item()
            grads = [p.grad for p in self.modules[0].parameters() if p.grad is not None]
            # Experts without tokens may have none. In fp64: over 10^7 values, fp32 sums are off by a percent.
            squares = [grad.norm(dtype=torch.float64).square() for grad in grads]
            norms["grad_parameters"] = torch.stack(squares).sum().sqrt().item()
        return norms

    def _experts_hit(self, cell: dict[str, Any]) -> float:
        """Different experts that a batch goes to, in the mean: their weights must be read."""
        router = _filled((cell["experts"], cell["hidden"]), 1.0, torch.float32, seed=1)
        with torch.no_grad():
            hit = [route(x, router, cell["top_k"])[1].unique().numel() for x in self.inputs]
        return sum(hit) / len(hit)


def _filled(shape: tuple[int, ...], std: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers; large tensors repeat a block of them, since all that counts here is their size."""
    block = torch.empty(BLOCK).normal_(0.0, std, generator=torch.Generator().manual_seed(seed)).to(dtype)
    filled = torch.empty(shape, dtype=dtype)
    for part in filled.view(-1).split(BLOCK):
        part.copy_(block[: part.numel()])
    return filled


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))


def _forget_peak() -> None:
    """Freed memory goes back to the system, and VmHWM begins again at what is in use."""
    library = ctypes.CDLL(None)
    if hasattr(library, "MallocExtension_ReleaseFreeMemory"):  # tcmalloc
        library.MallocExtension_ReleaseFreeMemory()
    else:
        library.malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # not allowed everywhere: then the peak counts building, too
