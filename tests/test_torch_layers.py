"""GroupedExperts and Linear: that they are what they say, on our kernels and without them."""

import pytest
import torch
from test_torch_ops import FP32, assert_close, values_and_gradients
from torch import nn

from coterie.torch import GroupedExperts, Linear, aten_ops


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
    actual = values_and_gradients(run, inputs)
    with aten_ops():
        expected = values_and_gradients(run, inputs)
    assert_close(actual, {name: value.double() for name, value in expected.items()}, torch.float32)
    ones = layer(x, ids)
    assert torch.allclose(ones, layer(x, ids, torch.ones(2, 9, 2)), rtol=FP32, atol=FP32)


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
