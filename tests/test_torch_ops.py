"""The ops torch.ops.coterie.*, against the plain PyTorch version, values and every gradient."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from op_inputs import (
    CASES,
    INNER,
    OPS,
    D,
    E,
    assert_close,
    expert_inputs,
    grouped_inputs,
    in_fp64,
    leaf,
    run,
    values_and_gradients,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from coterie.torch import RouterConfig, functional


def fp64_experts(x, expert_ids, weights, up, up_bias, down, down_bias, activation, gated) -> Tensor:
    """Token by token, choice by choice."""
    act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda v: F.gelu(v, approximate="tanh")}
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t]) + 0 * x[t]
        for k, e in enumerate(expert_ids[t].tolist()):
            if not 0 <= e < up.shape[0]:
                continue
            h = up[e] @ x[t] + (0 if up_bias is None else up_bias[e])
            h = act[activation](h[: down.shape[2]]) * h[down.shape[2] :] if gated else act[activation](h)
            y = down[e] @ h + (0 if down_bias is None else down_bias[e])
            total = total + (y if weights is None else weights[t, k] * y)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_experts_equal_the_slow_loop(case: str, dtype: torch.dtype) -> None:
    inputs = expert_inputs(case, dtype=dtype)
    expected = values_and_gradients(fp64_experts, in_fp64(inputs))
    actual = values_and_gradients(run, inputs)
    assert_close(actual, expected, dtype)
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name if name != "out" else "x"].dtype, name


def test_experts_take_the_dtypes_of_their_weights_apart() -> None:
    """fp32 activations and bf16 weights, as our trainer runs; the other way round; weights of choices in bf16."""
    inputs = expert_inputs("biased", dtype=torch.bfloat16)
    inputs["x"] = leaf(37, D, seed=1)
    assert run(**inputs).dtype == torch.float32
    expected = values_and_gradients(fp64_experts, in_fp64(inputs))
    assert_close(values_and_gradients(run, inputs), expected, torch.bfloat16)
    inputs = expert_inputs("biased")
    inputs["x"] = leaf(37, D, seed=1, dtype=torch.bfloat16)
    assert run(**inputs).dtype == torch.bfloat16
    expected = values_and_gradients(fp64_experts, in_fp64(inputs))
    assert_close(values_and_gradients(run, inputs), expected, torch.bfloat16)
    inputs = expert_inputs("gated", dtype=torch.bfloat16)
    inputs["weights"] = leaf(37, 3, seed=2, dtype=torch.bfloat16)
    actual = values_and_gradients(run, inputs)
    assert actual["weights"].dtype == torch.bfloat16
    assert_close(actual, values_and_gradients(fp64_experts, in_fp64(inputs)), torch.bfloat16)


def test_experts_take_int32_ids_and_any_strides() -> None:
    inputs = expert_inputs("biased")
    expected = values_and_gradients(run, inputs)
    strided = dict(inputs, expert_ids=inputs["expert_ids"].int().t().contiguous().t())
    for name in ("x", "weights", "up", "down", "up_bias"):
        strided[name] = inputs[name].detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
        assert not strided[name].is_contiguous()
    actual = values_and_gradients(run, strided)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(("T", "K"), [(0, 2), (3, 0), (1, 1)])
def test_experts_without_tokens_or_choices(T: int, K: int) -> None:
    inputs = expert_inputs("biased", T, K)
    result = values_and_gradients(run, inputs)
    if T * K == 0:
        assert all(not gradient.any() for gradient in result.values())
    else:
        assert_close(result, values_and_gradients(fp64_experts, in_fp64(inputs)), torch.float32)


def test_frozen_inputs_have_no_gradient_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = expert_inputs("biased")
    all_of_them = values_and_gradients(run, inputs)
    for name in ("up", "down", "up_bias", "down_bias"):
        inputs[name].requires_grad_(False)
    with torch.profiler.profile(record_shapes=True) as profile:
        frozen = values_and_gradients(run, inputs)
    assert frozen.keys() == {"out", "x", "weights"}
    for name, value in frozen.items():
        assert torch.equal(value, all_of_them[name]), name
    backward = [event for event in profile.events() if event.name == "coterie::experts_backward"]
    assert len(backward) == 1
    # What the op returns for them is empty: there was no memory to write a gradient to.
    kept = OPS.experts_forward(*(v.detach() if isinstance(v, Tensor) else v for v in inputs.values()))
    parts = [v.detach() if isinstance(v, Tensor) else v for v in inputs.values()]
    wanted = [True, True, False, False, False, False]
    gradients = OPS.experts_backward(torch.ones_like(kept[0]), *parts[:7], kept[1], kept[2], *parts[7:], wanted)
    assert [g.numel() == 0 for g in gradients] == [not w for w in wanted]


def test_no_grad_keeps_nothing() -> None:
    inputs = expert_inputs("gated")
    expected = run(**inputs).detach()
    with torch.no_grad():
        out = run(**inputs)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    with torch.inference_mode():
        assert torch.equal(run(**inputs), expected)


def test_double_use_checkpointing_and_accumulation() -> None:
    def twice(f):
        def g(x, **rest):
            return f(x=f(x=x, **rest), **rest)

        return g

    def checkpointed(**inputs):
        return checkpoint(lambda x: run(x=x, **rest(inputs)), inputs["x"], use_reentrant=False)

    def rest(inputs):
        return {name: value for name, value in inputs.items() if name != "x"}

    inputs = expert_inputs("biased")
    assert_close(
        values_and_gradients(twice(run), inputs),
        values_and_gradients(twice(fp64_experts), in_fp64(inputs)),
        torch.float32,
    )
    expected = values_and_gradients(run, inputs)
    for name, value in values_and_gradients(checkpointed, inputs).items():
        assert torch.equal(value, expected[name]), name


def test_results_do_not_depend_on_threads() -> None:
    inputs = expert_inputs("biased", T=301)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(values_and_gradients(run, inputs))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(33,), (0, 33), (7, 33), (2, 5, 33)], ids=str)
def test_linear_equals_atens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for bias in (None, leaf(47, seed=3, dtype=dtype)):
        weight = leaf(47, 33, seed=2, dtype=dtype, scale=33**-0.5)
        inputs = {"x": leaf(*shape, seed=1, dtype=dtype), "weight": weight, "bias": bias}
        assert_close(values_and_gradients(OPS.linear, inputs), values_and_gradients(F.linear, in_fp64(inputs)), dtype)


def head_inputs(T: int = 300, V: int = 101, dtype: torch.dtype = torch.float32) -> dict:
    targets = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3))
    targets[::7] = -100
    return {
        "hidden": leaf(T, D, seed=1, dtype=dtype),
        "weight": leaf(V, D, seed=2, dtype=dtype, scale=0.3),
        "targets": targets,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_cross_entropy_equals_atens(dtype: torch.dtype) -> None:
    inputs = head_inputs(dtype=dtype)
    expected = values_and_gradients(
        lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets), in_fp64(inputs)
    )
    actual = values_and_gradients(functional.cross_entropy, inputs)
    assert actual["out"].dtype == torch.float32
    assert_close(actual, expected, dtype)
    with torch.no_grad():
        assert torch.equal(functional.cross_entropy(**inputs), actual["out"])
    inputs["weight"].requires_grad_(False)
    frozen = values_and_gradients(functional.cross_entropy, inputs)
    assert frozen.keys() == {"out", "hidden"}
    assert torch.equal(frozen["hidden"], actual["hidden"])


def test_head_cross_entropy_distils() -> None:
    inputs = dict(
        head_inputs(), teacher_hidden=leaf(300, 8, seed=4).detach(), teacher_weight=leaf(101, 8, seed=5).detach()
    )

    def ours(**inputs):
        return OPS.head_cross_entropy(**inputs, alpha=0.7, temperature=2.0)[0]

    def oracle(hidden, weight, targets, teacher_hidden, teacher_weight):
        logits, scored = hidden @ weight.T, targets != -100
        log_p = (teacher_hidden @ teacher_weight.T / 2)[scored].log_softmax(-1)
        kl = F.kl_div((logits / 2)[scored].log_softmax(-1), log_p, log_target=True, reduction="batchmean")
        return F.cross_entropy(logits, targets) + 0.7 * 4 * kl

    assert_close(values_and_gradients(ours, inputs), values_and_gradients(oracle, in_fp64(inputs)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear_equals_the_loop(transposed: bool, dtype: torch.dtype) -> None:
    def view(f):
        return lambda x, offset, weight, bias: f(x, offset, weight.mT if transposed else weight, bias)

    def loop(x, offset, weight, bias):
        with functional.aten_ops():
            return functional.grouped_linear(x, offset, weight, bias)

    inputs = grouped_inputs(transposed, dtype)
    actual = values_and_gradients(view(OPS.grouped_linear), inputs)
    assert_close(actual, values_and_gradients(view(loop), in_fp64(inputs)), dtype)
    assert actual["weight"].is_contiguous()  # in the layout of the parameter, without a copy


def choice_inputs(dtype: torch.dtype = torch.float32, T: int = 37, K: int = 3) -> dict:
    """Tokens with their choices in order, some of them of no expert."""
    ids = expert_inputs("gated", T, K)["expert_ids"]
    order, offset = OPS.dispatch(ids, E)
    bias = leaf(E, INNER, seed=3, dtype=dtype)
    return {"x": leaf(T, D, seed=1, dtype=dtype), "offset": offset, "bias": bias, "order": order}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear_gathers_tokens(transposed: bool, dtype: torch.dtype) -> None:
    inputs = choice_inputs(dtype) | {"weight": grouped_inputs(transposed, dtype)["weight"]}

    def ours(x, offset, weight, bias, order):
        return OPS.grouped_linear(x, offset, weight.mT if transposed else weight, bias, order)

    def of_copies(x, offset, weight, bias, order):
        with functional.aten_ops():
            return functional.grouped_linear(x[order // 3], offset, weight.mT if transposed else weight, bias)

    actual = values_and_gradients(ours, inputs)
    assert_close(actual, values_and_gradients(of_copies, in_fp64(inputs)), dtype)
    assert actual["weight"].is_contiguous()
    with functional.aten_ops():
        weight = inputs["weight"].mT if transposed else inputs["weight"]
        aten = functional.grouped_linear(**(inputs | {"weight": weight}))
    assert_close({"out": aten}, {"out": actual["out"].double()}, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_equals_a_weighted_sum(dtype: torch.dtype) -> None:
    T, K = 37, 3
    order = torch.randperm(T * K, generator=torch.Generator().manual_seed(4))
    inputs = {"rows": leaf(T * K, D, seed=1, dtype=dtype), "order": order, "weights": leaf(T, K, seed=2)}

    def loop(rows, order, weights):
        out = [torch.zeros(D, dtype=rows.dtype)] * T
        for row, choice in zip(rows, order.tolist(), strict=True):
            out[choice // K] = out[choice // K] + weights.flatten()[choice] * row
        return torch.stack(out)

    expected = values_and_gradients(loop, in_fp64(inputs))
    actual = values_and_gradients(OPS.combine, inputs)
    assert actual["out"].dtype == torch.float32
    assert_close(actual, expected, dtype)
    with functional.aten_ops():
        assert_close(values_and_gradients(functional.combine, inputs), expected, dtype)
    only = values_and_gradients(OPS.combine, inputs | {"rows": inputs["rows"].detach()})
    assert torch.equal(only["weights"], actual["weights"])


def test_orders_are_refused_that_are_none() -> None:
    x, offset, weight = torch.randn(4, D), torch.tensor([0, 8]), torch.randn(1, 5, D)
    none = OPS.grouped_linear(x, torch.tensor([0, 0]), weight, None, torch.arange(0))
    assert none.shape == (0, 5)  # no choices at all
    many = torch.arange(2 * 257)
    for rows in (
        lambda: OPS.grouped_linear(x[:2], torch.tensor([0, 514]), weight, None, many),
        lambda: OPS.combine(torch.randn(514, D), many, torch.randn(2, 257)),
    ):
        with pytest.raises(ValueError, match="order has 257 choices a token, more than 256$"):
            rows()
    half = functional.combine(torch.ones(8, D), torch.arange(8), torch.ones(4, 2).half())
    assert torch.equal(half, torch.full((4, D), 2.0))
    for order, why in (
        (torch.arange(6), "order has 6 choices of 4 tokens"),
        (torch.arange(8) + 1, "order has 8 at 7, and is no permutation of 8 choices"),
        (torch.zeros(8, dtype=torch.int64), "order has 0 at 1, and is no permutation of 8 choices"),
    ):
        with pytest.raises(ValueError, match=f"^coterie::grouped_linear: {why}$"):
            OPS.grouped_linear(x, offset, weight, None, order)
        with pytest.raises(ValueError, match="^coterie::combine: order"):
            OPS.combine(torch.randn(8, D), order, torch.randn(4, 2))
    with pytest.raises(TypeError, match="^coterie::combine: order is Int, not Long$"):
        OPS.combine(torch.randn(8, D), torch.arange(8).int(), torch.randn(4, 2))


def test_dispatch_equals_a_stable_sort() -> None:
    ids = expert_inputs("gated")["expert_ids"]
    for form in (ids, ids.int(), ids[:0]):
        order, offset = OPS.dispatch(form, E)
        with functional.aten_ops():
            expected = functional.dispatch(form, E)
        assert torch.equal(order, expected[0])
        assert torch.equal(offset, expected[1])


def op_samples() -> dict:
    inputs = expert_inputs("biased", T=11)
    inputs["expert_ids"] = inputs["expert_ids"].clamp(0, E - 1)  # no row of what is kept stays undefined
    bare = [v.detach() if isinstance(v, Tensor) else v for v in inputs.values()]
    kept = OPS.experts_forward(*bare)
    head = head_inputs(T=9, V=10)
    bare_head = [v.detach() for v in head.values()]
    linear = [leaf(4, 3, D, seed=1), leaf(5, D, seed=2), leaf(5, seed=3)]
    grouped = grouped_inputs(False)
    bare_grouped = [v.detach() for v in grouped.values()]
    return {
        "experts": tuple(inputs.values()),
        "experts_forward": tuple(bare),
        "experts_backward": (torch.ones(11, D), *bare[:7], kept[1], kept[2], *bare[7:], [True, False] * 3),
        "linear": tuple(linear),
        "linear_backward": (torch.ones(4, 3, 5), *(t.detach() for t in linear), [True, False, True]),
        "head_cross_entropy": tuple(head.values()),
        "head_cross_entropy_forward": (*bare_head, None, None, 1.0, 1.0, -100, [True, True]),
        "dispatch": (inputs["expert_ids"], E),
        "grouped_linear": tuple(grouped.values()),
        "grouped_linear_backward": (torch.ones(30, INNER), *bare_grouped, None, [True, True, True]),
        "combine": (leaf(12, D, seed=1), torch.randperm(12), leaf(4, 3, seed=2)),
        "combine_backward": (torch.ones(4, D), torch.ones(12, D), torch.randperm(12), torch.ones(4, 3), [True, True]),
    }


@pytest.mark.parametrize("name", op_samples())
def test_opcheck(name: str) -> None:
    opcheck(getattr(OPS, name).default, op_samples()[name])


def test_compiles_into_one_graph() -> None:
    inputs = expert_inputs("biased")
    head = leaf(23, D, seed=8)
    targets = torch.arange(37) % 23

    def model(head=head, **inputs):
        y = OPS.linear(run(**inputs), inputs["up"][0, :D])
        return functional.cross_entropy(y, head, targets)

    expected = values_and_gradients(model, dict(inputs, head=head))
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        actual = values_and_gradients(compiled, dict(inputs, head=head))
        assert_close(actual, {name: value.double() for name, value in expected.items()}, torch.float32)


def test_autocast_runs_in_bf16() -> None:
    inputs = expert_inputs("biased")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(**inputs)
        assert out.dtype == torch.bfloat16
        assert OPS.linear(inputs["x"], inputs["up"][0]).dtype == torch.bfloat16
        loss = functional.cross_entropy(out, inputs["up"][0], torch.zeros(37, dtype=torch.int64))
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(out.float().sum(), [inputs["up"], inputs["x"], inputs["weights"]])
    assert all(g.dtype == torch.float32 for g in gradients)
    low = dict(inputs)
    for name in ("x", "up", "up_bias", "down", "down_bias"):
        low[name] = inputs[name].detach().bfloat16()
    assert torch.equal(out, run(**low))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(37, D).half()}, "x is Half, neither Float nor BFloat16"),
        ({"up": torch.randn(E, 2 * INNER, D).double()}, "up is Double, neither Float nor BFloat16"),
        ({"down": torch.randn(E, D, INNER).bfloat16()}, "up is Float and down is BFloat16"),
        ({"weights": torch.randn(37, 3).half()}, "weights is Half, neither Float nor BFloat16"),
        ({"up_bias": torch.randn(E, 2 * INNER).half()}, "up_bias is Half, neither Float nor BFloat16"),
        ({"expert_ids": torch.zeros(37, 3)}, "expert_ids is Float, neither Long nor Int"),
        ({"expert_ids": torch.zeros(36, 3).long()}, "expert_ids has 36 entries along axis 0 instead of 37"),
        ({"weights": torch.zeros(37, 2)}, "weights has 2 entries along axis 1 instead of 3"),
        ({"x": torch.randn(1, 37, D)}, "x has 3 axes instead of 2"),
        ({"down": torch.randn(E, D, INNER + 1)}, "up has 26 entries along axis 1 instead of 28"),
        ({"down_bias": torch.randn(E, D + 1)}, "down_bias has 20 entries along axis 1 instead of 19"),
        (
            {"activation": "mish"},
            "activation: 'mish' is not one of relu, gelu, gelu_new, gelu_pytorch_tanh, silu, swish, clamped_swiglu",
        ),
        (
            {"expert_ids": torch.zeros(37, 257).long(), "weights": None},
            "expert_ids has 257 choices a token, more than 256",
        ),
    ],
)
def test_experts_refuse_in_one_line(change: dict, message: str) -> None:
    inputs = dict(expert_inputs("biased"), **change)
    for place in ("cpu", "meta"):
        there = {name: v.detach().to(place) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        with pytest.raises((TypeError, ValueError)) as caught:
            run(**there)
        assert str(caught.value) == "coterie::experts: " + message


def test_tangents_of_forward_mode_are_refused() -> None:
    """To lose one would be a silent zero."""
    x, router = torch.randn(2, 4), torch.randn(3, 4)
    up, down = torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    functions = [
        lambda x: functional.linear(x, router),
        lambda x: functional.route(x, 2, RouterConfig()).weights_TK,
        lambda x: functional.experts(x, ids, None, up, down),
        lambda x: OPS.grouped_linear(x, torch.tensor([0, 2, 2, 2]), up),
    ]
    for function in functions:
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=r"^coterie's ops have no forward-mode derivative \(jvp\)$"),
        ):
            function(forward_ad.make_dual(x, torch.ones_like(x)))


def test_transforms_of_torch_func_are_refused_by_our_name() -> None:
    x, weight = torch.randn(4, D), torch.randn(5, D)
    loss = lambda weight: functional.linear(x, weight).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"^coterie's ops don't go through torch.func's transforms; "):
        torch.func.grad(loss)(weight)
    with functional.aten_ops():
        assert torch.allclose(torch.func.grad(loss)(weight), 2 * (x @ weight.T).T @ x, rtol=1e-4, atol=1e-4)


def test_others_refuse_in_one_line() -> None:
    x, weight, targets = torch.randn(4, D), torch.randn(5, D), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="^coterie::linear: weight is Half, neither Float nor BFloat16$"):
        OPS.linear(x, weight.half())
    with pytest.raises(TypeError, match="^coterie::head_cross_entropy: hidden is Half, neither Float nor BFloat16$"):
        functional.cross_entropy(x.half(), weight, targets)
    with pytest.raises(IndexError, match="^coterie::head_cross_entropy: targets has 5, outside of a vocabulary of 5$"):
        functional.cross_entropy(x, weight, targets + 5)
    with pytest.raises(ValueError, match="^coterie::grouped_linear: offset ends at 5, after the 4 rows of x$"):
        OPS.grouped_linear(x, torch.tensor([0, 5]), weight[None])
    with pytest.raises(RuntimeError, match="has no second derivative"):
        x.requires_grad_()
        torch.autograd.grad(OPS.linear(x, weight).square().sum(), x, create_graph=True)


def test_functions_run_aten_ops_when_told() -> None:
    inputs = expert_inputs("biased")

    def ours(x, expert_ids, weights, up, up_bias, down, down_bias, activation, gated):
        return functional.experts(x, expert_ids, weights, up, down, up_bias, down_bias, activation, gated)

    def names(f) -> set[str]:
        with torch.profiler.profile() as profile:
            f()
        return {event.name for event in profile.events()}

    assert "coterie::experts" in names(lambda: ours(**inputs))
    with functional.aten_ops():
        assert not any(name.startswith("coterie::") for name in names(lambda: ours(**inputs)))
        plain = values_and_gradients(ours, inputs)
        loss = values_and_gradients(functional.cross_entropy, head_inputs())
    assert_close(plain, values_and_gradients(fp64_experts, in_fp64(inputs)), torch.float32)
    assert_close(
        values_and_gradients(functional.cross_entropy, head_inputs()),
        {name: value.double() for name, value in loss.items()},
        torch.float32,
    )


def test_an_activation_without_gradient_serves_and_is_not_trained() -> None:
    x, up, down = torch.randn(5, D), torch.randn(2, 2 * INNER, D), torch.randn(2, D, INNER)
    ids = torch.zeros(5, 1, dtype=torch.int64)
    assert functional.experts(x, ids, None, up, down, activation="clamped_swiglu", gated=True).shape == x.shape
    message = "^coterie::experts: activation: 'clamped_swiglu' has no gradient$"
    with pytest.raises(ValueError, match=message):
        functional.experts(x.requires_grad_(), ids, None, up, down, activation="clamped_swiglu", gated=True)
    with pytest.raises(ValueError, match="^coterie::experts: activation: 'clamped_swiglu' needs a gate$"):
        functional.experts(x.detach(), ids, None, up, down, activation="clamped_swiglu", gated=False)


def test_linear_of_two_types_is_of_the_weights() -> None:
    x, weight = torch.randn(9, D).bfloat16(), torch.randn(7, D)
    results = []
    for places in (nullcontext, functional.aten_ops):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with places():
            y = functional.linear(*leaves, dtype=torch.float32)
        y.square().sum().backward()
        results.append((y.detach(), leaves[0].grad, leaves[1].grad))
    assert [t.dtype for t in results[0]] == [torch.float32, torch.bfloat16, torch.float32]
    for ours, expected, tolerance in zip(*results, (1e-5, 2**-7, 1e-5), strict=True):  # one rounding to bf16 apart
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
