"""Which modules coterie.torch.MoE takes for experts of its kernels: those that compute the same, gradients included."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from coterie.torch import MoE
from coterie.torch.expert_forms import recognise

D, INNER = 24, 20


class Gated(nn.Module):
    """Gate and up in an order that names don't tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * F.silu(self.b(x)))


class Scaled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class Clamped(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50))


class Stopped(nn.Sequential):
    """The plain MLP, whose input gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class HalfFrozen(nn.Sequential):
    """The plain MLP, whose first layer gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            inner = self[1](self[0](x))
        return self[2](inner)


class Slowed(nn.Sequential):
    """The plain MLP with half the gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y / 2 + (y / 2).detach()


class SlowedInTraining(Slowed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else nn.Sequential.forward(self, x)


class OneFrozen(nn.Sequential):
    """The plain MLP, one of whose weights gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self[2].weight
        frozen = torch.zeros_like(weight, dtype=torch.bool)
        frozen[-1, -1] = True
        return F.linear(self[1](self[0](x)), torch.where(frozen, weight.detach(), weight), self[2].bias)


class Checkpointed(nn.Sequential):
    """The plain MLP, whose two halves are computed again in backward()."""

    use_reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=self.use_reentrant)
        return checkpoint(self[2], inner, use_reentrant=self.use_reentrant)


class CheckpointedAnew(Checkpointed):
    use_reentrant = False


def mlp(middle: nn.Module, cls: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return cls(nn.Linear(D, INNER), middle, nn.Linear(INNER, D))


def test_recognises_what_the_kernels_have() -> None:
    names = {nn.GELU(): "gelu", nn.GELU("tanh"): "gelu_new", nn.SiLU(): "silu", nn.ReLU(): "relu"}
    for module, name in names.items():
        form = recognise(mlp(module), D)
        assert (form.activation, form.gated) == (name, False)
        assert form.parts["up"] == ("0.weight",) and form.parts["down_bias"] == ("2.bias",)
    form = recognise(Gated(), D)
    assert (form.activation, form.gated, form.parts["up"]) == ("silu", True, ("b.weight", "a.weight"))
    zero = mlp(nn.GELU())
    nn.init.zeros_(zero[2].weight)  # what the weights happen to be decides nothing
    assert recognise(zero, D).activation == "gelu"
    assert recognise(mlp(nn.GELU()).requires_grad_(False), D).activation == "gelu"
    assert recognise(nn.Sequential(nn.Linear(D, INNER), nn.GELU(), nn.Dropout(0.0), nn.Linear(INNER, D)), D)
    with torch.no_grad():
        assert recognise(mlp(nn.GELU()), D)
    for D_wide in (1, 2, 1024):  # few values of many rows, and many of few
        wide = nn.Sequential(nn.Linear(D_wide, 2 * D_wide), nn.ReLU(), nn.Linear(2 * D_wide, D_wide))
        assert recognise(wide, D_wide).activation == "relu"


def test_recognises_nothing_else() -> None:
    dropout = nn.Sequential(nn.Linear(D, INNER), nn.GELU(), nn.Dropout(0.1), nn.Linear(INNER, D))
    others = [
        dropout,
        mlp(nn.Mish()),
        mlp(nn.Identity()),
        mlp(nn.GELU(), Scaled),
        mlp(nn.GELU(), Clamped),
        nn.Linear(D, D),
        nn.Sequential(nn.Linear(D, INNER), nn.GELU(), nn.LayerNorm(INNER), nn.Linear(INNER, D)),
        mlp(nn.GELU()).half(),
        *(mlp(nn.GELU(), cls) for cls in (Stopped, HalfFrozen, Slowed, SlowedInTraining, OneFrozen)),
    ]
    mixed = mlp(nn.GELU())
    mixed[0].weight.requires_grad_(False)
    assert [recognise(module, D) for module in [*others, mixed]] == [None] * (len(others) + 1)
    state = torch.get_rng_state()
    recognise(dropout, D)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cls", [Checkpointed, CheckpointedAnew])
def test_recognises_checkpointed_experts(cls: type[nn.Sequential]) -> None:
    assert recognise(mlp(nn.GELU(), cls), D).activation == "gelu"


def test_recognises_experts_of_inference_mode() -> None:
    expert = mlp(nn.GELU())
    with torch.inference_mode():
        layers = [MoE(D, module, num_experts=2).eval() for module in (expert, mlp(nn.GELU()))]
        assert all(hasattr(layer.deepspeed_moe.experts, "up") for layer in layers)
        assert layers[1](torch.randn(4, D))[0].shape == (4, D)
        inner = mlp(nn.GELU())
    assert recognise(inner, D).activation == "gelu" and inner[0].weight.is_inference()


def test_a_probe_is_little_larger_than_its_copy_of_the_expert() -> None:
    wide = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        assert recognise(wide, 512)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    most = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    copy = sum(parameter.numel() for parameter in wide.parameters()) * 8  # in float64
    assert copy < most < 2 * copy


def test_hooks_of_experts_stay() -> None:
    for register in (
        lambda m: m.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda m: m.register_forward_pre_hook(lambda module, inputs: None),
        lambda m: m.register_full_backward_hook(lambda module, grad_input, grad_output: None),
        lambda m: m.register_full_backward_pre_hook(lambda module, grad_output: None),
    ):
        hooked = mlp(nn.GELU())
        register(hooked[1])
        assert recognise(hooked, D) is None


def test_what_an_expert_keeps_from_its_input_stays_kept() -> None:
    layer = MoE(D, mlp(nn.GELU(), Stopped), num_experts=1, drop_tokens=False)  # of one expert: the gate is constant
    x = torch.randn(4, D, requires_grad=True)
    layer(x)[0].sum().backward()
    assert not x.grad.any()
