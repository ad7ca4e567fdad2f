"""coterie.torch.MoE against DeepSpeed's formulas written out densely, and against DeepSpeed where it is installed.

Tolerances, fp32, of the largest value: an order of summation changes a dot product of n terms by at most n 2^-24 of
the sum of magnitudes; n <= 64 tokens or features, and four products follow each other (gate, up, down, mix).
Capacities leave most choices in place: the gradient of a weight that is normalised over one kept choice is zero, and
all that one could compare is how the terms cancel.
"""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coterie.torch import Linear, MoE, Router, aten_ops, is_moe_param
from coterie.torch.expert_forms import recognise
from coterie.torch.moe.expert_parallel import run_experts_of_ranks

FP32 = 4 * 64 * 2.0**-24
T, D, INNER, E = 48, 24, 20, 6


class Gated(nn.Module):
    """Gate and up in an order that names don't tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, INNER, bias=False), nn.Linear(D, INNER, bias=False)
        self.c = nn.Linear(INNER, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * F.silu(self.b(x)))


class Odd(nn.Module):
    """A middle that our kernels don't have, and Megatron's second result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(F.mish(self.up(x))), None


EXPERTS = {
    "mlp": lambda: nn.Sequential(nn.Linear(D, INNER), nn.GELU(), nn.Linear(INNER, D)),
    "square": lambda: nn.Sequential(nn.Linear(D, D, bias=False), nn.ReLU(), nn.Linear(D, D)),
    "gated": Gated,
    "odd": Odd,
}


def dense_gates(gate: nn.Module, x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Combine weights [T, E], balance loss and counts, from one-hot masks as GShard and DeepSpeed define them."""
    scores = F.linear(x, gate.wg.weight).softmax(-1)
    k = gate.k
    factor = gate.capacity_factor if training else gate.eval_capacity_factor
    capacity = max(int(torch.ceil(torch.tensor(factor * k) * (x.shape[0] / E))), gate.min_capacity)
    masks = [F.one_hot(choice, E) for choice in scores.topk(k).indices.unbind(1)]
    chosen = sum(masks)
    if not gate.drop_tokens:
        kept = chosen
    elif k <= 2:
        places = torch.cat(masks).cumsum(0) - 1
        kept = sum((torch.cat(masks) * (places < capacity)).chunk(k))
    else:
        best = (scores * chosen).topk(min(capacity, x.shape[0]), dim=0).indices
        kept = chosen * torch.zeros_like(chosen).scatter(0, best, 1)
    counted = masks[0] if k == 2 else chosen
    l_aux = E * (scores.mean(0) * counted.double().mean(0).to(x.dtype)).sum() / (k if k > 2 else 1)
    weights = scores * kept
    if k > 1:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return weights, l_aux, chosen.sum(0)


def dense_moe(layer: MoE, experts: list[nn.Module], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = x.flatten(0, -2)
    weights, l_aux, counts = dense_gates(layer.deepspeed_moe.gate, flat, layer.training)

    def first(y: Tensor | tuple) -> Tensor:
        return y[0] if isinstance(y, tuple) else y

    y = sum(weights[:, e, None] * first(expert(flat)) for e, expert in enumerate(experts)).view_as(x)
    if layer.use_residual and layer.coefficient is not None:
        mix = layer.coefficient(x).softmax(-1)
        y = y * mix[..., :1] + first(layer.mlp(x)) * mix[..., 1:]
    elif layer.use_residual:
        y = y + first(layer.mlp(x))
    return y, l_aux, counts


def build(expert: str = "mlp", **arguments) -> MoE:
    """A layer whose experts differ, with spread logits."""
    torch.manual_seed(1)
    options = {"k": 1, "use_rts": False, "top2_2nd_expert_sampling": False, "min_capacity": 2} | arguments
    layer = MoE(D, EXPERTS[expert](), num_experts=E, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def experts_of(layer: MoE, expert: str) -> list[nn.Module]:
    """Modules with the layer's weights, out of its state_dict."""
    state, modules = layer.state_dict(), []
    for e in range(E):
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{e}."
        module = EXPERTS[expert]()
        module.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        modules.append(module)
    return modules


def gradients_by_name(layer: MoE) -> dict[str, Tensor]:
    """Gradients under the names of the state_dict: a layer whose weights are the gradients knows them."""
    twin = copy.deepcopy(layer)
    for mine, theirs in zip(twin.parameters(), layer.parameters(), strict=True):
        mine.data = theirs.grad if theirs.grad is not None else torch.zeros_like(theirs)
    return {name: value.clone() for name, value in twin.state_dict().items()}


def weighted_sum(output: Tensor, l_aux: Tensor) -> Tensor:
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return (output * weighting).sum() + 3.0 * l_aux


def assert_close(actual: Tensor, expected: Tensor, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    assert (actual - expected).abs().max() <= FP32 * expected.abs().max(), name


CASES = [
    *({"k": k, "capacity_factor": factor} for k in (1, 2, 4) for factor in (0.5, 1.0, 4.0)),
    *({"k": k, "drop_tokens": False} for k in (1, 2, 4)),
    {"k": 2, "capacity_factor": 0.0, "min_capacity": 12},
    *({"k": k, "use_residual": True, "capacity_factor": 0.7} for k in (1, 2, 4)),
    {"k": 1, "use_residual": True, "residual_mix": "sum"},
    {"k": 2, "eval_capacity_factor": 0.4, "training": False},
]


@pytest.mark.parametrize("aten", [False, True])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_dense_formulas(case: dict, expert: str, aten: bool) -> None:
    case = dict(case)
    training = case.pop("training", True)
    layer = build(expert, **case).train(training)
    experts = experts_of(layer, expert)
    x = torch.randn(4, T // 4, D, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def run(f) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer.zero_grad(), x.__setattr__("grad", None)
        output, l_aux, counts = f()
        weighted_sum(output, l_aux).backward()
        return output.detach(), l_aux.detach(), counts, x.grad

    expected = run(lambda: dense_moe(layer, experts, x))
    expected_gradients = {n: g.clone() for n, g in gradients_by_name(layer).items() if "deepspeed_experts" not in n}
    for e, module in enumerate(experts):
        for name, parameter in module.named_parameters():
            expected_gradients[f"deepspeed_moe.experts.deepspeed_experts.{e}.{name}"] = parameter.grad
    if aten:
        with aten_ops():
            actual = run(lambda: layer(x))
    else:
        actual = run(lambda: layer(x))
    for name, a, b in zip(("output", "l_aux", "exp_counts", "x"), actual, expected, strict=True):
        assert_close(a, b, name)
    assert actual[2].dtype == torch.int64
    gradients = gradients_by_name(layer)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close(gradients[name], gradient, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_deepspeed(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # read on import
    moe = pytest.importorskip("deepspeed.moe.layer")
    if "residual_mix" in case:
        pytest.skip("DeepSpeed has the learned mix alone")
    case = dict(case)
    training = case.pop("training", True)
    ours = build("mlp", **case).train(training)
    options = {"use_rts": False, "top2_2nd_expert_sampling": False, "min_capacity": 2} | case
    theirs = moe.MoE(D, EXPERTS["mlp"](), num_experts=E, **options).train(training)
    # Equal masks have no order in DeepSpeed's top-k of a full expert; by position is what its cumsum means.
    topk = torch.topk

    def first_of_equals(values: Tensor, k: int, dim: int = -1, **rest):
        if dim != 0 or values.is_floating_point():
            return topk(values, k, dim=dim, **rest)
        order = values.sort(dim=0, descending=True, stable=True)
        return order.values[:k], order.indices[:k]

    monkeypatch.setattr(torch, "topk", first_of_equals)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(4), requires_grad=True)
    results = []
    for layer in (ours, theirs):
        x.grad = None
        output, l_aux, counts = layer(x)
        weighted_sum(output, l_aux).backward()
        results.append((output.detach(), l_aux.detach(), counts, x.grad))
    for name, a, b in zip(("output", "l_aux", "exp_counts", "x"), *results, strict=True):
        assert_close(a, b, name)
    gradients = gradients_by_name(ours)
    for name, parameter in theirs.named_parameters():
        assert_close(gradients[name], parameter.grad, name)


@pytest.mark.parametrize("expert", EXPERTS)
def test_state_dict_has_deepspeeds_names(expert: str) -> None:
    layer = build(expert, use_residual=True)
    names = list(EXPERTS[expert]().state_dict())
    experts = [f"deepspeed_moe.experts.deepspeed_experts.{e}.{name}" for e in range(E) for name in names]
    others = ["deepspeed_moe.gate.wg.weight", *(f"mlp.{n}" for n in names), "coefficient.weight", "coefficient.bias"]
    assert set(layer.state_dict()) == {*experts, *others}
    other = MoE(D, EXPERTS[expert](), num_experts=E, use_residual=True)
    other.load_state_dict(layer.state_dict())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    broken = dict(layer.state_dict(), **{experts[0]: torch.zeros(3)})
    with pytest.raises(RuntimeError, match=experts[0].replace(".", r"\.")):
        other.load_state_dict(broken)
    del broken[experts[0]]
    assert other.load_state_dict(broken, strict=False).missing_keys == [experts[0]]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(dict(layer.state_dict(), **{experts[0] + "x": torch.zeros(3)}))


def test_experts_begin_as_copies_of_the_given_one() -> None:
    for name, make in EXPERTS.items():
        expert = make()
        layer = MoE(D, expert, num_experts=E)
        for module in experts_of(layer, name):
            for (key, value), copied in zip(expert.state_dict().items(), module.state_dict().values(), strict=True):
                assert torch.equal(value, copied), key


def test_random_token_selection_keeps_capacity_and_follows_the_seed() -> None:
    layer = build("mlp", use_rts=True, capacity_factor=0.5)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(4))
    kept = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        ids, weights, _, counts = layer.deepspeed_moe.gate(x)
        kept.append(ids)
        taken = torch.bincount(ids[ids >= 0], minlength=E)
        assert torch.equal(taken, counts.clamp(max=layer.deepspeed_moe.gate.capacity(T)))
        assert not weights[ids < 0].any()
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_noise_moves_choices_in_training_alone() -> None:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(4))
    for k, options in ((1, {"noisy_gate_policy": "RSample"}), (1, {"noisy_gate_policy": "Jitter"})):
        layer = build("mlp", k=k, drop_tokens=False, **options)
        clean = build("mlp", k=k, drop_tokens=False)(x)[0]
        torch.manual_seed(5)
        assert not torch.equal(layer(x)[0], clean)
        assert torch.equal(layer.eval()(x)[0], clean)
    sampled, clean = build("mlp", k=2, drop_tokens=False, top2_2nd_expert_sampling=True), build("mlp", k=2)
    ids, expected = sampled.deepspeed_moe.gate(x)[0], clean.deepspeed_moe.gate(x)[0]
    assert torch.equal(ids[:, 0], expected[:, 0].where(expected[:, 0] >= 0, ids[:, 0]))
    assert (ids[:, 1] != expected[:, 1]).any() and (ids[:, 0] != ids[:, 1]).all()


def test_unused_tokens_go_nowhere() -> None:
    layer = build("mlp", capacity_factor=0.5)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(4))
    used = torch.arange(T) % 3 != 0
    output, l_aux, counts = layer(x, used)
    assert not output[~used].any()
    assert counts.sum() == used.sum()
    scores = F.linear(x, layer.deepspeed_moe.gate.wg.weight).softmax(-1)
    mask = F.one_hot(scores.argmax(-1), E) * used[:, None]
    assert_close(l_aux, E * (scores.mean(0) * mask.float().mean(0)).sum())
    capacity = layer.deepspeed_moe.gate.capacity(T)
    kept = (mask * (mask.cumsum(0) - 1 < capacity)).sum(1).bool()
    assert torch.equal(output.abs().amax(1) > 0, kept)


def test_bf16_checkpointing_and_compilation() -> None:
    layer = build("mlp", k=2, use_residual=True)
    x = torch.randn(T, D, requires_grad=True)
    expected, l_aux, _ = layer(x)
    again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    assert torch.equal(again, expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, compiled_l_aux, _ = compiled(x)
    assert_close(output, expected)
    assert_close(compiled_l_aux, l_aux)
    for length in (T - 5, T - 9):  # of any length
        assert_close(compiled(x[:length])[0], layer(x[:length])[0])
    low = layer.bfloat16()
    output = low(x.bfloat16())[0]
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in low.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ep_size": 4}, r"^\[MoE\] ep_size \(4\) does not divide 6 experts$"),
        ({"k": 7}, r"^\[MoE\] k \(7\) is not in \[1, num_experts \(6\)\]$"),
        ({"residual_mix": "mean"}, r"^\[MoE\] residual_mix \(mean\) is not one of"),
        ({"noisy_gate_policy": "Gauss"}, r"^\[MoE\] noisy_gate_policy \(Gauss\) is not one of"),
        ({"capacity_factor": -1.0}, r"^\[MoE\] capacity_factor \(-1.0\) is not 0 or a positive number$"),
        ({"min_capacity": -1}, r"^\[MoE\] min_capacity \(-1\) is negative$"),
        ({"enable_expert_tensor_parallelism": True}, r"^\[MoE\] enable_expert_tensor_parallelism \(True\)"),
    ],
)
def test_refuses_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(D, EXPERTS["mlp"](), num_experts=E, **arguments)


@pytest.mark.parametrize("aten", [False, True])
@pytest.mark.parametrize("expert", ["mlp", "odd"])
def test_autocast_leaves_the_gate_in_float32(expert: str, aten: bool) -> None:
    torch.manual_seed(3)
    layer, router = MoE(D, EXPERTS[expert](), num_experts=E, use_rts=False), Router(D, E, 2)
    x = torch.randn(T, D)
    with aten_ops() if aten else torch.enable_grad():
        expected, routed = layer(x), router(x)
        with torch.autocast("cpu", torch.bfloat16):
            output, l_aux, exp_counts = layer(x)
            assert torch.equal(router(x).logits_TE, routed.logits_TE)
    assert output.dtype == torch.bfloat16
    assert torch.equal(l_aux, expected[1]) and torch.equal(exp_counts, expected[2])
    assert torch.allclose(output.float(), expected[0], rtol=0, atol=3 * 2.0**-8 * expected[0].abs().max().item())


class Alone:
    """A group of one rank."""

    size = 1

    def all_to_all_v(self, sent, sent_bytes: list[int], received, received_bytes: list[int], label: str) -> None:
        received[...] = sent


@pytest.mark.parametrize("expert", ["mlp", "odd"])
def test_experts_of_ranks_are_of_the_types_of_those_of_one(expert: str) -> None:
    experts = build(expert).deepspeed_moe.experts
    x, ids, weights = torch.randn(T, D), torch.randint(0, E, (T, 2)), torch.rand(T, 2)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = experts(x, ids, weights)
            actual = run_experts_of_ranks(experts, E, Alone(), x, ids, weights)
        assert actual.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
        tolerance = 3 * 2.0**-8 if enabled else FP32
        assert torch.allclose(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", ["mlp", "gated"])
def test_apply_sees_the_layers_of_every_expert(name: str) -> None:
    torch.manual_seed(4)
    seen = []

    def initialise(module: nn.Module) -> None:
        if type(module) is nn.Linear:
            seen.append(module)
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.constant_(module.bias, len(seen))

    layer = MoE(D, EXPERTS[name](), num_experts=3).apply(initialise)
    experts = layer.deepspeed_moe.experts
    assert len(seen) == 1 + 3 * (2 if name == "mlp" else 3)
    assert not torch.equal(experts.up[0], experts.up[1]) and float(experts.down.detach().std()) < 0.03
    if name == "mlp":  # the gate comes after the experts or before: all that counts is that they differ
        assert len(set(experts.up_bias[:, 0].tolist())) == 3


def test_copies_stay_experts_and_the_given_module_may_go() -> None:
    expert = EXPERTS["mlp"]()
    given = weakref.ref(expert[0].weight)
    layer = MoE(D, expert, num_experts=2)
    del expert
    gc.collect()
    assert given() is None
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        assert all(is_moe_param(p) and p.group_name == "ep_size_1" for p in other.deepspeed_moe.experts.parameters())
        assert not any(is_moe_param(p) for p in other.deepspeed_moe.gate.parameters())


def test_recognises_our_linear_and_experts_on_the_meta_device() -> None:
    ours = nn.Sequential(Linear(D, INNER), nn.GELU(), Linear(INNER, D))
    layer = MoE(D, ours, num_experts=2)
    with torch.device("meta"):
        empty = MoE(D, EXPERTS["mlp"](), num_experts=2)
    assert recognise(ours, D) is not None and hasattr(empty.deepspeed_moe.experts, "up")
    with pytest.raises(RuntimeError, match="meta device: load with assign=True"):
        empty.load_state_dict(layer.state_dict())
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(5, D)
    assert torch.equal(empty.eval()(x)[0], layer.eval()(x)[0])
    assert all(is_moe_param(p) for p in empty.deepspeed_moe.experts.parameters())


def test_assigning_takes_the_types_that_are_loaded() -> None:
    layer, other = build(), build().bfloat16()
    nn.init.normal_(other.deepspeed_moe.experts.up)
    missing = "deepspeed_moe.experts.deepspeed_experts.1.0.weight"
    expected = other.state_dict() | {missing: layer.state_dict()[missing].bfloat16()}
    loaded = {name: value for name, value in expected.items() if name != missing}
    assert layer.load_state_dict(loaded, assign=True, strict=False).missing_keys == [missing]
    actual = layer.state_dict()
    for name, value in expected.items():
        assert actual[name].dtype == torch.bfloat16 and torch.equal(actual[name], value), name
    assert all(is_moe_param(p) and p.requires_grad for p in layer.deepspeed_moe.experts.parameters())
    layer.load_state_dict(build().state_dict())  # without it, types stay
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("expert", ["mlp", "odd"])
def test_new_parameters_of_experts_are_experts(expert: str) -> None:
    layer = build(expert)
    with torch.device("meta"):
        empty = MoE(D, EXPERTS[expert](), num_experts=E)
    for other in (empty.to_empty(device="cpu"), build(expert)):
        other.load_state_dict(layer.state_dict(), assign=True)
        assert all(is_moe_param(p) for p in other.deepspeed_moe.experts.parameters())
        assert not any(is_moe_param(p) for p in other.deepspeed_moe.gate.parameters())


def test_meta_experts_are_experts_before_anything_is_loaded() -> None:
    for expert in ("mlp", "odd"):
        with torch.device("meta"):
            empty = MoE(D, EXPERTS[expert](), num_experts=2)
        assert all(is_moe_param(p) for p in empty.to_empty(device="cpu").deepspeed_moe.experts.parameters())


def test_hooks_see_what_is_loaded() -> None:
    layer, state = build(), {name.replace("deepspeed_experts", "old"): v for name, v in build().state_dict().items()}
    nn.init.zeros_(layer.deepspeed_moe.experts.up)
    experts, seen = layer.deepspeed_moe.experts, []

    def rename(state_dict: dict, prefix: str, *_: object) -> None:
        for name in [name for name in state_dict if name.startswith(prefix + "old.")]:
            state_dict[name.replace("old.", "deepspeed_experts.")] = state_dict.pop(name)

    experts._register_load_state_dict_pre_hook(rename)
    experts.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    layer.load_state_dict(state)
    assert seen == [experts] and torch.equal(experts.up, build().deepspeed_moe.experts.up)


class Strict(nn.Module):
    """What runs on one row, and not on none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(0, -2))
        return (y - y.max()).view(y.shape[0], -1).view_as(x)


@pytest.mark.parametrize("tokens", [0, 1])
def test_experts_without_tokens_have_gradients_of_zero(tokens: int) -> None:
    layer = MoE(D, Strict(), num_experts=3)
    x = torch.randn(tokens, D, requires_grad=True)
    output, _, exp_counts = layer(x)
    output.square().sum().backward()
    assert output.shape == x.grad.shape == x.shape and exp_counts.sum() == tokens
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    for expert, count in zip(experts, exp_counts, strict=True):
        assert all(p.grad.any() == (count > 0) for p in expert.parameters())
    # Where no rows came from other ranks, the way back to them, which all ranks take together, is still there.
    rows = torch.zeros(0, D, requires_grad=True)
    layer.deepspeed_moe.experts(rows, torch.zeros(0, 1, dtype=torch.int64), torch.ones(0, 1)).sum().backward()
    assert rows.grad is not None


@pytest.mark.parametrize("k", [1, 2])
def test_checkpointing_repeats_random_choices(k: int) -> None:
    layer = build(k=k, use_rts=True, top2_2nd_expert_sampling=True)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def gradients(layer: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        output, l_aux, _ = layer(x)
        return torch.autograd.grad(weighted_sum(output, l_aux), [x, *parameters])

    parameters = list(layer.parameters())
    expected, other = gradients(layer, 0), gradients(layer, 1)
    actual = gradients(lambda x: checkpoint(layer, x, use_reentrant=False), 0)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_no_tokens_have_no_loss() -> None:
    for k in (1, 2, 3):
        output, l_aux, exp_counts = MoE(D, EXPERTS["mlp"](), num_experts=E, k=k)(torch.randn(0, D))
        assert output.shape == (0, D) and l_aux.item() == 0 and exp_counts.sum() == 0


def test_experts_in_float64_are_summed_in_it() -> None:
    layer = MoE(D, Odd().double(), num_experts=2, drop_tokens=False).double()
    x = torch.randn(4, D, dtype=torch.float64)
    output, _, _ = layer(x)
    choice, weights, _, _ = layer.deepspeed_moe.gate(x)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    expected = torch.stack([w.double() * experts[int(e)](row)[0] for w, e, row in zip(weights, choice, x, strict=True)])
    assert torch.allclose(output, expected, rtol=0, atol=1e-12)
