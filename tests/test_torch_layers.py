"""GroupedExperts and Linear: that they are what they say, on our kernels and without them."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from op_inputs import FP32, assert_close, values_and_gradients
from torch import Tensor, nn
from torch.library import opcheck

from coterie.torch import GroupedExperts, Linear, MoE, Router, RouterConfig, aten_ops, functional, moe, route
from coterie.torch.moe import run_experts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu_new", False)])
def test_grouped_experts_equal_modules_one_by_one(activation: str, gated: bool, bias: bool) -> None:
    torch.manual_seed(3)
    layer = GroupedExperts(4, 24, 16, activation, gated, bias)
    x = torch.randn(2, 9, 24, requires_grad=True)
    ids, weights = torch.randint(-1, 4, (2, 9, 2)), torch.rand(2, 9, 2, requires_grad=True)

    def run(**inputs) -> torch.Tensor:
        return layer(inputs["x"], ids, inputs["weights"])

    inputs = {"x": x, "weights": weights, **dict(layer.named_parameters())}

    def plain(**inputs) -> torch.Tensor:
        flat = (inputs["x"].flatten(0, 1), ids.flatten(0, 1), inputs["weights"].flatten(0, 1))
        parts = (inputs.get(name) for name in ("up.weight", "up.bias", "down.weight", "down.bias"))
        return run_experts(*flat, *parts, activation, gated).view_as(inputs["x"])

    actual = values_and_gradients(run, inputs)
    expected = {name: value.double() for name, value in values_and_gradients(plain, inputs).items()}
    assert_close(actual, expected, torch.float32)
    with aten_ops():
        assert_close(values_and_gradients(run, inputs), expected, torch.float32)
    ones = layer(x, ids)
    assert torch.allclose(ones, layer(x, ids, torch.ones(2, 9, 2)), rtol=FP32, atol=FP32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu", False), ("gelu_new", False)])
def test_gradients_by_finite_differences(activation: str, gated: bool, bias: bool) -> None:
    """The path that our kernels are held against, in fp64; with an expert without tokens and choices of no expert."""
    torch.manual_seed(4)
    layer = GroupedExperts(4, 3, 5, activation, gated, bias).double()
    ids = torch.tensor([[0, 2], [2, 1], [-1, 0], [1, 1]])
    x, weights = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: torch.Tensor, weights: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, ids, weights))

    with aten_ops():
        assert torch.autograd.gradcheck(run, [v.detach().requires_grad_() for v in (x, weights, *parameters)])


def test_grouped_experts_begin_as_linear_layers_do() -> None:
    layer = GroupedExperts(3, 64, 16, bias=True)
    for part, inputs in ((layer.up, 64), (layer.down, 16)):
        for parameter in part.parameters():
            assert 0.9 * inputs**-0.5 < parameter.abs().max() <= inputs**-0.5
    with pytest.raises(ValueError, match="^activation: 'mish' is not one of relu, gelu"):
        GroupedExperts(3, 64, 16, activation="mish")


def test_linear_is_torchs() -> None:
    theirs = nn.Linear(24, 10)
    ours = Linear(24, 10)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 24, requires_grad=True)
    actual = values_and_gradients(lambda x, **_: ours(x), {"x": x, **dict(ours.named_parameters())})
    expected = values_and_gradients(lambda x, **_: theirs(x), {"x": x, **dict(theirs.named_parameters())})
    assert_close(actual, {name: value.double() for name, value in expected.items()}, torch.float32)


ROUTERS = {
    "plain": {},
    "normalized": {"normalize": True, "routed_scaling": 2.5},
    "kept": {"normalize": True, "normalize_over": "kept", "capacity_factor": 0.6, "drop_policy": "position"},
    "probability": {"capacity_factor": 0.6, "drop_policy": "probability"},
    "deepseek": {"score_function": "sigmoid", "choice_bias": True, "num_groups": 4, "top_k_groups": 2},
    "expert_choice": {"chooser": "experts", "capacity_factor": 1.0},
}


def router_of(name: str) -> Router:
    torch.manual_seed(5)
    router = Router(24, 8, 2, RouterConfig(**ROUTERS[name]))
    if router.choice_bias is not None:
        nn.init.normal_(router.choice_bias, std=0.1)
    return router


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_router_equals_the_plain_one(name: str, training: bool) -> None:
    router = router_of(name).train(training)
    inputs = {"x": torch.randn(3, 15, 24, requires_grad=True), "weight": router.weight}
    routings = []

    def run(x, weight) -> torch.Tensor:
        routings.append(router(x))
        return routings[-1].weights_TK

    def run_plain(x, weight) -> torch.Tensor:
        routings.append(moe.Router.forward(router, x.flatten(0, -2)))
        return routings[-1].weights_TK

    actual = values_and_gradients(run, inputs)
    expected = values_and_gradients(run_plain, inputs)
    assert_close(actual, {name: value.double() for name, value in expected.items()}, torch.float32)
    ours, plain = routings
    with aten_ops():
        assert torch.equal(router(inputs["x"]).weights_TK, plain.weights_TK)
    assert torch.equal(ours.expert_ids_TK, plain.expert_ids_TK)
    assert torch.equal(ours.kept_TK, plain.kept_TK)
    assert ours.experts_chose == plain.experts_chose
    assert torch.allclose(ours.balance_loss(), plain.balance_loss(), rtol=FP32)


def test_router_and_experts_are_a_layer() -> None:
    router, experts = router_of("kept"), GroupedExperts(8, 24, 16)

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = router(x)
        ids = routing.expert_ids_TK.where(routing.kept_TK, -1)
        return experts(x, ids, routing.weights_TK), routing.balance_loss()

    x = torch.randn(15, 24)
    expected = layer(x)[0]
    out, balance = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)(x)
    assert torch.allclose(out, expected, rtol=0, atol=FP32 * expected.abs().max().item())
    (out.sum() + balance).backward()
    assert router.weight.grad.any() and experts.up.weight.grad.any()


def test_random_choices_follow_torchs_generator() -> None:
    logits = torch.randn(64, 8)
    dropping = RouterConfig(capacity_factor=0.5)
    noisy = RouterConfig(choice_noise="rsample")
    for config, field in ((dropping, "kept_TK"), (noisy, "expert_ids_TK")):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(getattr(route(logits, 2, config, training=True), field))
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    state = torch.get_rng_state()
    route(logits, 2, RouterConfig(), training=True)
    assert torch.equal(torch.get_rng_state(), state)  # nothing random, nothing drawn


@pytest.mark.parametrize("name", ["route", "route_forward", "route_backward", "jitter_factors"])
def test_opcheck(name: str) -> None:
    ops = torch.ops.coterie
    json = '{"num_experts": 8, "top_k": 2, "normalize": true, "capacity_factor": 0.5}'
    logits, key = torch.randn(9, 8), torch.tensor([3, 0, 0, 0])
    _, ids, kept, _, scores = ops.route_forward(logits, json, None, key, True)
    samples = {
        "route": (logits.requires_grad_(), json, None, key, True),
        "route_forward": (logits.detach(), json, None, key, True),
        "route_backward": (torch.ones(9, 2), ids, kept, scores, json),
        "jitter_factors": (key, 9, 8, 0.1),
    }
    opcheck(getattr(ops, name).default, samples[name])


@pytest.mark.parametrize(
    ("logits", "config", "message"),
    [
        (torch.randn(3, 4), '{"num_experts": 8}', "logits has 4 entries along axis 1 instead of 8"),
        (torch.randn(3, 8).half(), '{"num_experts": 8}', "logits is Half, not Float"),
        (torch.randn(3, 8), '{"num_experts": 8, "topk": 2}', "[router]: topk: unknown key (2)"),
        (torch.randn(3, 8), '{"num_experts": 8, "top_k": 9}', "[router] top_k (9) exceeds num_experts (8)"),
        (torch.randn(3, 8), "8", "[router] 8: not an object of JSON"),
        (torch.randn(3, 8), '{"num_experts": 8, "choice_bias": true}', "choice_bias is missing"),
    ],
)  # fmt: skip
def test_route_refuses_in_one_line(logits: torch.Tensor, config: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        torch.ops.coterie.route(logits, config)
    assert str(caught.value) == "coterie::route: " + message


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("transformers")
    text = (Path(__file__).parent.parent / "docs" / "pytorch.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 5
    exec("\n".join(examples), {})


def test_training_lowers_a_loss() -> None:
    """A mixture of four experts learns four different maps, with an optimizer of torch."""
    torch.manual_seed(0)
    layer = nn.ModuleDict({"experts": GroupedExperts(4, 16, 32, "gelu", gated=False), "out": Linear(16, 16)})
    maps = torch.randn(4, 16, 16) / 4
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        x, ids = torch.randn(64, 16), torch.randint(0, 4, (64, 1))
        y = layer["out"](layer["experts"](x, ids))
        loss = (y - torch.einsum("ti,tio->to", x, maps[ids[:, 0]])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("aten", [False, True])
def test_mixed_types(aten: bool) -> None:
    """What is multiplied is of the weights' type, what comes out of the tokens'."""
    torch.manual_seed(6)
    layer, linear = GroupedExperts(3, 8, 8).bfloat16(), torch.nn.Linear(8, 4).bfloat16()
    x, ids = torch.randn(5, 8), torch.randint(0, 3, (5, 1))
    with aten_ops() if aten else torch.enable_grad():
        y, z = layer(x, ids), functional.linear(x, linear.weight)
        loss = functional.cross_entropy(x, linear.weight, torch.tensor([0, 1, 2, 3, -100]))
    assert y.dtype == z.dtype == loss.dtype == torch.float32
    assert torch.allclose(z, torch.nn.functional.linear(x.bfloat16(), linear.weight).float(), atol=0.03)


TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias_type", TYPES, ids=str)
@pytest.mark.parametrize("weight_type", TYPES, ids=str)
@pytest.mark.parametrize("x_type", TYPES, ids=str)
def test_aten_ops_are_of_the_kernels_types(x_type, weight_type, bias_type, autocast: bool) -> None:
    torch.manual_seed(6)
    x, ids, offset = torch.randn(6, 8, dtype=x_type), torch.randint(0, 3, (6, 2)), torch.tensor([1, 2, 2, 5])
    up, down = (torch.randn(3, 8, 8, dtype=weight_type) for _ in range(2))
    biases = [torch.randn(3, 8, dtype=bias_type) for _ in range(2)]

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [
                functional.linear(x, up[0], biases[0][0]),
                functional.linear(x, up[0], dtype=torch.float32),
                functional.experts(x, ids, torch.ones(6, 2), up, down, *biases, gated=False),
                functional.grouped_linear(x, offset, up, biases[0]),
            ]

    with aten_ops():
        plain = run()
    for ours, theirs in zip(run(), plain, strict=True):
        assert ours.dtype == theirs.dtype
        # Of the steps to a result at most four round to bf16: input, bias, inner and result.
        assert torch.allclose(ours.float(), theirs.float(), rtol=0, atol=4 * 2.0**-8 * theirs.abs().max().item())


def test_modules_run_on_the_meta_device() -> None:
    with torch.device("meta"):
        x = torch.randn(2, 9, 24, requires_grad=True)
        expert = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 24))
        layer, router = MoE(24, expert, num_experts=4), Router(24, 8, 2, RouterConfig(jitter=0.1, capacity_factor=1.0))
        experts, head = GroupedExperts(8, 24, 16), Linear(24, 5)
    y, l_aux, exp_counts = layer(x)
    routing = router(y, key=torch.zeros(4, dtype=torch.int64))
    ids, weights = (t.view(2, 9, 2) for t in (routing.expert_ids_TK, routing.weights_TK))
    out = head(experts(y, ids, weights).bfloat16())
    assert (out.shape, out.dtype, out.device.type) == ((2, 9, 5), torch.bfloat16, "meta")
    assert exp_counts.shape == (4,)
    (out.float().sum() + l_aux + routing.balance_loss()).backward()
    for module in (layer, router, experts, head):
        assert all(p.grad.is_meta and p.grad.shape == p.shape for p in module.parameters())
    assert x.grad.shape == x.shape


def test_cross_entropy_in_chunks() -> None:
    torch.manual_seed(7)
    tokens = functional.LOGITS_CHUNK * 2 + 3
    hidden, weight = torch.randn(tokens, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    targets = torch.randint(0, 5, (tokens,))
    targets[::7] = -100
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with aten_ops():
        loss = functional.cross_entropy(hidden, weight, targets)
    assert torch.allclose(loss, expected, rtol=1e-5)
    for actual, gradient in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert torch.allclose(actual, gradient, rtol=1e-4, atol=1e-7)


def test_a_scaled_loss_scales_the_gradient() -> None:
    """By the factor as it is, and not as bfloat16 rounds it."""
    hidden, weight = torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(5, 8).bfloat16()
    targets = torch.randint(0, 5, (9,))
    (whole,) = torch.autograd.grad(functional.cross_entropy(hidden, weight, targets), hidden)
    (third,) = torch.autograd.grad(functional.cross_entropy(hidden, weight, targets) / 3, hidden)
    assert torch.equal(third, (whole.float() * torch.tensor(1 / 3)).bfloat16())


def test_choice_bias_moves_against_the_load() -> None:
    torch.manual_seed(8)
    config = RouterConfig(score_function="sigmoid", choice_bias=True)
    router = Router(8, 4, 1, config).bfloat16()
    assert router.choice_bias.dtype == torch.float32
    exact = torch.tensor([1.001, 0, 0, 0])
    for cast in (nn.Module.bfloat16, nn.Module.double, lambda module: module.to("cpu", torch.bfloat16)):
        other = Router(8, 4, 1, config)
        other.choice_bias.copy_(exact)
        assert torch.equal(cast(other).choice_bias, exact)
    with torch.device("meta"):
        empty = Router(8, 4, 1, config)
    assert empty.to_empty(device="cpu").bfloat16().choice_bias.dtype == torch.float32
    x = torch.randn(64, 8).bfloat16() + 1
    before = router(x).load()
    for _ in range(300):
        router.update_choice_bias(router(x).load().chosen_E, rate=0.01)
    after = router(x).load()
    assert after.metrics()["max_violation"] < 0.5 * before.metrics()["max_violation"]
    assert "choice_bias" in router.state_dict()
    with pytest.raises(ValueError, match="has no choice_bias"):
        Router(8, 4, 1).update_choice_bias(before.chosen_E)


def test_load_of_a_routing() -> None:
    logits = torch.tensor([[3.0, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0], [0, 3, 0, 0]])
    config = RouterConfig(capacity_factor=1e-3, min_capacity=2, drop_policy="position")
    routing = route(logits, 1, config, training=True)
    load = routing.load()
    assert load.chosen_E.tolist() == [3, 1, 0, 0] and load.kept_E.tolist() == [2, 1, 0, 0]
    metrics = load.metrics()
    assert metrics["dropped"] == pytest.approx(0.25) and metrics["dead_experts"] == 2
    assert metrics["max_violation"] == pytest.approx(2) and metrics["entropy"] == pytest.approx(0.5623, abs=1e-4)
    assert (load + load).metrics() == pytest.approx(metrics)
    # Half a batch, by the load of the whole: the mean over both halves is the loss of the whole.
    halves = [route(part, 1, config, training=True).balance_loss(chosen_E=load.chosen_E) for part in logits.split(2)]
    assert torch.allclose(sum(halves) / 2, routing.balance_loss())


@pytest.mark.parametrize("noise", ["rsample", "none"])
def test_a_key_makes_choices_those_of_the_whole_batch(noise: str) -> None:
    torch.manual_seed(9)
    logits, config = torch.randn(32, 6), RouterConfig(choice_noise=noise)

    def key(first_token: int, step: int = 5) -> torch.Tensor:
        return torch.tensor([7, step, 1, first_token])

    whole = route(logits, 2, config, training=True, key=key(0))
    parts = [route(logits[first : first + 8], 2, config, training=True, key=key(first)) for first in range(0, 32, 8)]
    assert torch.equal(torch.cat([part.expert_ids_TK for part in parts]), whole.expert_ids_TK)
    other = route(logits, 2, config, training=True, key=key(0, step=6))
    assert torch.equal(other.expert_ids_TK, whole.expert_ids_TK) == (noise == "none")


def test_a_key_makes_the_jitter_that_of_the_whole_batch() -> None:
    torch.manual_seed(9)
    router, x = Router(24, 6, 2, RouterConfig(jitter=0.1)), torch.randn(2, 16, 24)

    def logits(x: torch.Tensor, first_token: int = 0, step: int = 5) -> torch.Tensor:
        return router(x, key=torch.tensor([7, step, 1, first_token])).logits_TE

    state = torch.get_rng_state()
    whole = logits(x)
    assert torch.equal(logits(x), whole) and not torch.allclose(logits(x, step=6), whole, atol=1e-3)
    parts = torch.cat([logits(part, first) for first, part in zip((0, 16), x, strict=True)])
    assert torch.allclose(parts, whole, rtol=0, atol=FP32 * whole.abs().max().item())
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn
    factors = torch.ops.coterie.jitter_factors(torch.tensor([7, 5, 1, 0]), 32, 24, 0.1)
    assert 0.099 < (factors - 1).abs().max() <= 0.1 + FP32 and (factors - 1).mean().abs() < 0.01
    expected = (x.flatten(0, 1) * factors) @ router.weight.T
    assert torch.allclose(whole, expected, rtol=0, atol=FP32 * expected.abs().max().item())
    router.eval()
    assert torch.equal(logits(x), router(x).logits_TE)
    with pytest.raises(ValueError, match="^coterie::jitter_factors: key has 3 entries along axis 0 instead of 4$"):
        torch.ops.coterie.jitter_factors(torch.zeros(3, dtype=torch.int64), 1, 1, 0.1)


@pytest.mark.parametrize("aten", [False, True])
def test_route_wants_the_bias_that_the_configuration_has(aten: bool) -> None:
    with aten_ops() if aten else torch.enable_grad():
        with pytest.raises(ValueError, match="choice_bias is missing"):
            route(torch.randn(2, 4), 1, RouterConfig(choice_bias=True))
        with pytest.raises(ValueError, match="choice_bias is given"):
            route(torch.randn(2, 4), 1, RouterConfig(), torch.zeros(4))


def test_no_tokens_have_no_losses() -> None:
    routing = route(torch.randn(0, 4), 1, RouterConfig())
    assert float(routing.balance_loss()) == float(routing.z_loss()) == 0


def test_all_activations_can_be_saved(tmp_path: Path) -> None:
    for activation in moe.ACTIVATIONS:
        torch.save(GroupedExperts(2, 8, 8, activation, gated=False), tmp_path / "experts.pt")


def test_torchs_default_type_changes_nothing() -> None:
    config = RouterConfig(capacity_factor=1.1, choice_bias=True)
    logits = torch.randn(33, 4)

    def results() -> tuple[list[int], Tensor, torch.dtype]:
        capacities = [config.capacity(n, 1, 1, True) for n in (10, 1001)]
        return capacities, route(logits, 1, RouterConfig()).balance_loss(), Router(8, 4, 1, config).choice_bias.dtype

    before = results()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert results() == before
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("top_k", range(1, 8))
def test_capacity_is_deepspeeds(top_k: int) -> None:
    for factor in (1.2, 1.1, 0.7, 1.25):
        config = RouterConfig(capacity_factor=factor, min_capacity=1)
        for tokens in (10, 40, 80, 120, 200):
            places = torch.tensor(factor * top_k) * (tokens / 8)  # its code, in fp32
            assert config.capacity(tokens, 8, top_k, True) == int(torch.ceil(places))


def test_a_huge_capacity_drops_nothing() -> None:
    config = RouterConfig(capacity_factor=1e300)
    for place in (nullcontext, aten_ops):
        with place():
            assert route(torch.zeros(64, 8), 2, config, training=True).kept_TK.all()
            assert route(torch.zeros(0, 8), 2, config, training=True).kept_TK.shape == (0, 2)
