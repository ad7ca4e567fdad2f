"""Recognises modules that our kernels compute: two Linear layers around an activation, or three with a gate.

Nothing is guessed from names: a copy of the module with random weights runs on a probe, in float64, in training and
evaluation mode, and has to equal the form that was read out of it, with all its gradients.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.torch.functional import aten_ops
from coterie.torch.layers import Linear
from coterie.torch.moe import ACTIVATIONS, feed_forward_inner

# Rows of a probe: fewer where a row has many values itself.
LEAST_PROBES, MOST_PROBES, PROBE_VALUES = 8, 64, 1 << 14
# Columns that a gradient is compared in. One tells everything apart; of several, one is far from cancelling out.
SKETCH_COLUMNS = 8
# Relative to the largest output. The tanh form of GELU differs from GELU by 2e-4; float64 sums by 1e-12.
TOLERANCE = 1e-9
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class ExpertForm:
    """An MLP that our kernels compute.

    Parameters
    ----------
    activation, gated
        As coterie.torch.functional.experts takes them.
    parts
        For "up", "down" and, with biases, "up_bias" and "down_bias": the names of the module's parameters whose rows
        it consists of (gate rows first).
    tensors
        The module's parameters by name.
    """

    activation: str
    gated: bool
    parts: dict[str, tuple[str, ...]]
    tensors: dict[str, nn.Parameter]

    def run(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """What the form computes, with these tensors for the module's parameters."""
        up = self._linear("up", x, tensors)
        return self._linear("down", feed_forward_inner(up, ACTIVATIONS[self.activation], self.gated), tensors)

    def _linear(self, part: str, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """One of the layers: outputs are put together rather than weights, which may be large."""
        weights = self.parts[part]
        biases = self.parts.get(f"{part}_bias", ("",) * len(weights))
        return torch.cat([F.linear(x, tensors[w], tensors.get(b)) for w, b in zip(weights, biases, strict=True)], -1)


def recognise(expert: nn.Module, hidden_size: int) -> ExpertForm | None:
    """The form of an expert; None when it is none that our kernels have."""
    forms = _candidates(expert, hidden_size)
    if not forms:
        return None
    try:
        with torch.device("cpu"), torch.inference_mode(False):  # where that is on, nothing has gradients
            return _proven(expert, hidden_size, forms)
    except Exception:  # whatever a foreign module does with a probe: then it is not recognised
        return None


def _candidates(expert: nn.Module, hidden_size: int) -> list[ExpertForm]:
    """The forms that the shapes of the module's parameters allow."""
    linears = {name: m for name, m in expert.named_modules() if type(m) in (nn.Linear, Linear)}
    tensors = dict(expert.named_parameters())
    own = sum(len(list(m.parameters())) for m in linears.values())
    uniform = len({(t.dtype, t.device, t.requires_grad) for t in tensors.values()}) == 1
    plain = not any(getattr(m, hooks) for m in expert.modules() for hooks in HOOKS)
    if len(linears) not in (2, 3) or own != len(tensors) or not uniform or not plain or list(expert.buffers()):
        return []
    if next(iter(tensors.values())).dtype not in (torch.float32, torch.bfloat16):
        return []
    forms = []
    for *ups, down in permutations(linears):
        wide = {linears[name].weight.shape for name in ups}
        F_D = next(iter(wide))
        if len(wide) > 1 or F_D[1] != hidden_size or linears[down].weight.shape != (hidden_size, F_D[0]):
            continue
        if len({linears[name].bias is None for name in ups}) > 1:
            continue
        parts = {"up": _names(ups, "weight"), "down": _names([down], "weight")}
        if linears[ups[0]].bias is not None:
            parts["up_bias"] = _names(ups, "bias")
        if linears[down].bias is not None:
            parts["down_bias"] = _names([down], "bias")
        forms += [ExpertForm(name, len(ups) == 2, parts, tensors) for name in ("silu", "gelu", "gelu_new", "relu")]
    return forms


def _names(modules: list[str], kind: str) -> tuple[str, ...]:
    return tuple(f"{module}.{kind}" for module in modules)


def _proven(expert: nn.Module, hidden_size: int, forms: list[ExpertForm]) -> ExpertForm | None:
    """The one form that computes what the module does."""
    generator = torch.Generator().manual_seed(0)
    probe = _with_random_weights(expert, generator)
    # Small and large values, so that a clamp or a shift of the activation shows.
    rows = min(max(PROBE_VALUES // hidden_size, LEAST_PROBES), MOST_PROBES)
    sizes = torch.logspace(-2, 3, rows, dtype=torch.float64)[:, None]
    x = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64) * sizes
    grad = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64) / sizes
    tensors = dict(probe.named_parameters())
    sketches = _sketched_gradients({"input": x.requires_grad_(True), **tensors}, generator)

    def results(run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        sketches.clear()
        y = run(x)
        y.backward(grad)  # as all of torch can, reentrant checkpoints too, unlike autograd.grad
        return {"output": y.detach(), **sketches}

    # A dropout must not move the generator of the model; our kernels don't have float64.
    with torch.random.fork_rng(devices=[]), aten_ops(), torch.enable_grad():
        y = probe(x).detach()
        with torch.no_grad():
            equal = [form for form in forms if _equal(form.run(x, tensors), y)]
        if len(equal) != 1:
            return None
        expected = results(partial(equal[0].run, tensors=tensors))
        return equal[0] if all(_all_equal(expected, results(probe.train(mode))) for mode in (True, False)) else None


@torch.no_grad()
def _with_random_weights(expert: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float64."""
    probe = copy.deepcopy(expert).to("meta").double().to_empty(device="cpu").requires_grad_(True)
    for parameter in probe.parameters():
        deviation = 2.0 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
        bound = 3**0.5 * deviation
        parameter.uniform_(-bound, bound, generator=generator)
    return probe


def _sketched_gradients(leaves: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """What backward() fills with the leaves' gradients times a few random vectors, which differ where gradients do.

    Gradients themselves would take the memory of several experts: each is freed before the next one is computed.
    """
    widest = max(leaf.shape[-1] for leaf in leaves.values())
    vectors = torch.randn(widest, SKETCH_COLUMNS, generator=generator, dtype=torch.float64)
    sketches: dict[str, Tensor] = {}

    def take(name: str, leaf: Tensor) -> None:
        sketches[name] = sketches.get(name, 0) + leaf.grad @ vectors[: leaf.shape[-1]]
        leaf.grad = None

    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(partial(take, name))
    return sketches


def _all_equal(expected: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return expected.keys() == others.keys() and all(_equal(expected[name], others[name]) for name in expected)


@torch.no_grad()
def _equal(expected: Tensor, other: Tensor) -> bool:
    """Whether they differ by rounding alone, of each row's largest value."""
    scale = expected.abs().amax(-1, keepdim=True)
    return other.shape == expected.shape and bool(((other - expected).abs() <= TOLERANCE * scale).all())
