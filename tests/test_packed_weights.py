"""packed_weights(): the same bits, changes seen, bounds kept, on the ops that use them."""

import subprocess
import sys

import pytest
import torch
from op_inputs import CASES, OPS, D, expert_inputs, grouped_inputs, leaf, run, values_and_gradients
from torch import Tensor

from coterie.torch import functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_packed_weights_give_the_same_bits(case: str, dtype: torch.dtype) -> None:
    """Few rows of an expert, many, and what the backward pass is given; any strides."""
    for T in (5, 37, 700):
        inputs = expert_inputs(case, T, dtype=dtype)
        inputs["up"] = inputs["up"].detach().mT.contiguous().mT.requires_grad_()
        expected = values_and_gradients(run, inputs)
        with functional.packed_weights():
            for use in range(2):
                values_and_gradients(run, inputs)
                assert (functional.packed_weight_bytes() > 0) == (use == 1)
            actual = values_and_gradients(run, inputs)
            with torch.no_grad():
                assert torch.equal(run(**inputs), expected["out"])
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_linear_weights_give_the_same_bits(transposed: bool, dtype: torch.dtype) -> None:
    inputs = grouped_inputs(transposed, dtype)
    if transposed:
        inputs["weight"] = inputs["weight"].mT
    x, offset, weight, bias = inputs.values()

    def outputs() -> list[Tensor]:
        return [OPS.grouped_linear(x, offset, weight, bias), OPS.linear(x, weight[1], bias[1])]

    with torch.no_grad():
        expected = outputs()
        with functional.packed_weights():
            for _ in range(3):
                actual = outputs()
            assert functional.packed_weight_bytes() > 0
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("fused", [False, True])
def test_packed_weights_follow_changes(fused: bool) -> None:
    """Fused optimizers don't count theirs, which is seen to."""
    x, weight = leaf(3, D, seed=1).detach(), torch.nn.Parameter(leaf(4, D, seed=2).detach())
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)

    def is_right() -> bool:
        return torch.equal(OPS.linear(x, weight), OPS.linear(x, weight.detach().clone()))

    with functional.packed_weights(), torch.no_grad():
        for change in (lambda: None, lambda: weight.mul_(2), optimizer.step, lambda: weight.copy_(weight + 1)):
            weight.grad = torch.ones_like(weight)
            change()
            assert all(is_right() for _ in range(3))
            assert functional.packed_weight_bytes() > 0


def test_packed_weights_end_with_the_last_block() -> None:
    x, weight = leaf(3, D, seed=1).detach(), leaf(4, D, seed=2).detach()

    def use(weight: Tensor) -> int:
        for _ in range(3):
            OPS.linear(x, weight)
        return functional.packed_weight_bytes()

    blocks = [functional.packed_weights() for _ in range(2)]
    blocks[0].__enter__()
    held = use(weight)
    assert held > 0
    blocks[1].__enter__()
    blocks[0].__exit__(None, None, None)  # as in another thread
    assert functional.packed_weight_bytes() == held
    for max_bytes in (0, 1):  # smaller than the outer one's
        with functional.packed_weights(max_bytes):
            assert use(weight) == held
    blocks[1].__exit__(None, None, None)
    assert use(weight) == 0
    with functional.packed_weights(max_bytes=1):
        assert use(weight) == 0


@pytest.mark.parametrize("max_bytes", [-1, "4GB", 0.5])
def test_packed_weights_refuse_a_bound_that_is_none(max_bytes: object) -> None:
    with pytest.raises(ValueError, match="^max_bytes: .* is no number of bytes from 0 up$"):
        with functional.packed_weights(max_bytes):
            pass
    with functional.packed_weights(max_bytes=1 << 70):  # and the next block is none the worse
        pass


SHORT_OF_MEMORY = """
import resource, torch
from coterie.torch import functional

x, weight = torch.rand(3, 2048), torch.rand(8192, 2048)  # 64 MiB
linear = torch.ops.coterie.linear
expected = linear(x, weight)
with functional.packed_weights():
    linear(x, weight)
    pages = int(open("/proc/self/statm").read().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 20), limits[1]))
    assert torch.equal(linear(x, weight), expected)
    assert functional.packed_weight_bytes() == 0
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(linear(x, weight), expected)
    assert functional.packed_weight_bytes() >= weight.nbytes
"""


def test_weights_that_there_is_no_memory_to_pack_are_used_as_they_are() -> None:
    """In a process of its own, whose heap holds nothing that was freed."""
    run_python = [sys.executable, "-c", SHORT_OF_MEMORY]
    result = subprocess.run(run_python, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_packed_weights_of_autocast_live_as_long_as_its_copies() -> None:
    x, weight = leaf(3, D, seed=1).detach(), torch.nn.Parameter(leaf(4, D, seed=2).detach())
    with functional.packed_weights(), torch.no_grad():
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                OPS.linear(x, weight)
        assert functional.packed_weight_bytes() == 0
