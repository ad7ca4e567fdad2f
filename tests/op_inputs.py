"""What tests of the ops torch.ops.coterie.* share: inputs, gradients and how close they must be.

Tolerances, of the largest value. fp32: orders of summation of n terms differ by at most n 2^-24 of the sum of
magnitudes; typical is sqrt(n), so that n 2^-24 with n <= 512 bounds both. bf16: the oracle computes in fp64 from
the same bf16 inputs, so that the error is that of rounding what is kept in bf16 to 8 bits: relative 2^-9 for each
of at most 6 such tensors on the way to a gradient (slopes, inner, gradient of inner, of pre, weighted gradient,
result), in the Frobenius norm since the factors between them are of order one.
"""

import torch
from torch import Tensor

OPS = torch.ops.coterie
FP32 = 512 * 2.0**-24
BF16 = 6 * 2.0**-9
D, INNER, E = 19, 13, 6
CASES = {
    "gated": ("silu", True, False, True),
    "biased": ("silu", True, True, True),
    "plain": ("gelu", False, True, True),
    "tanh": ("gelu_pytorch_tanh", False, False, True),
    "relu": ("relu", False, True, True),
    "unweighted": ("silu", True, True, False),
}


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()


def expert_inputs(case: str, T: int = 37, K: int = 3, dtype: torch.dtype = torch.float32) -> dict:
    activation, gated, bias, weighted = CASES[case]
    U = INNER * (2 if gated else 1)
    # Ids from -1 to E: some choices are of no expert, on both sides; expert 2 stays empty.
    ids = torch.randint(-1, E + 1, (T, K), generator=torch.Generator().manual_seed(7))
    return {
        "x": leaf(T, D, seed=1, dtype=dtype),
        "expert_ids": torch.where(ids == 2, 3, ids),
        "weights": leaf(T, K, seed=2) if weighted else None,
        "up": leaf(E, U, D, seed=3, dtype=dtype, scale=D**-0.5),
        "up_bias": leaf(E, U, seed=4, dtype=dtype) if bias else None,
        "down": leaf(E, D, INNER, seed=5, dtype=dtype, scale=INNER**-0.5),
        "down_bias": leaf(E, D, seed=6, dtype=dtype) if bias else None,
        "activation": activation,
        "gated": gated,
    }


def values_and_gradients(f, inputs: dict) -> dict[str, Tensor]:
    """f's output and the gradient of everything that asks for one, for a fixed weighting of the output."""
    leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    out = f(**inputs)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((out.double() * weighting).sum(), list(leaves.values()), materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_fp64(inputs: dict) -> dict:
    def cast(t: object) -> object:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t.detach().double().requires_grad_(t.requires_grad)

    return {name: cast(t) for name, t in inputs.items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        got = actual[name].double()
        assert got.shape == value.shape, name
        if dtype == torch.float32:
            assert value.numel() == 0 or (got - value).abs().max() <= FP32 * value.abs().max(), name
        else:
            assert (got - value).norm() <= BF16 * value.norm(), name


def run(x, expert_ids, weights, up, up_bias, down, down_bias, activation, gated) -> Tensor:
    return OPS.experts(x, expert_ids, weights, up, up_bias, down, down_bias, activation, gated)


def grouped_inputs(transposed: bool, dtype: torch.dtype = torch.float32) -> dict:
    weight = leaf(E, D, INNER, seed=2, dtype=dtype) if transposed else leaf(E, INNER, D, seed=2, dtype=dtype)
    return {
        "x": leaf(30, D, seed=1, dtype=dtype),
        "offset": torch.tensor([2, 5, 5, 17, 20, 21, 27]),  # rows before and after belong to nobody, expert 1 is empty
        "weight": weight,
        "bias": leaf(E, INNER, seed=3, dtype=dtype),
    }
