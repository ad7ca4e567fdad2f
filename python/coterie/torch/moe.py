"""Router, experts and MLP in plain PyTorch: the slow, obvious version.

It is what a user reads to learn what a Mixture-of-Experts layer computes, and the oracle that the
fast kernels are held against. Legend: T tokens, D hidden, E experts, K experts per token, F inner size, U rows of the
up projection (2F when gated: gate rows first).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESIDUAL_KINDS = ("none", "sum", "learned", "shared_gate")
SCORE_FUNCTIONS = ("softmax", "sigmoid")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


def _from_dict(cls: type, values: dict[str, Any], where: str) -> Any:
    """Build a dataclass from JSON; an unknown key is an error."""
    unknown = set(values) - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"{where}: unknown key {sorted(unknown)[0]!r}")
    return cls(**values)


@dataclass
class RouterConfig:
    """How tokens choose experts.

    Parameters
    ----------
    score_function
        "softmax" or "sigmoid" of the router's logits.
    normalize
        Divide the weights of the chosen K by their sum.
    routed_scaling
        Factor on the weights, last of all.
    capacity_factor
        0 is dropless. Otherwise an expert takes at most ``capacity`` tokens while training.
    min_capacity
        The floor of ``capacity``.
    """

    score_function: str = "softmax"
    normalize: bool = False
    routed_scaling: float = 1.0
    capacity_factor: float = 0.0
    min_capacity: int = 4

    def __post_init__(self) -> None:
        if self.score_function not in SCORE_FUNCTIONS:
            raise ValueError(f"[router] score_function ({self.score_function}) is not one of {SCORE_FUNCTIONS}")

    def capacity(self, num_tokens: int, num_experts: int, top_k: int) -> int:
        """Tokens that one expert may take out of ``num_tokens``."""
        if self.capacity_factor <= 0:
            return num_tokens
        return max(math.ceil(self.capacity_factor * num_tokens * top_k / num_experts), self.min_capacity)


@dataclass
class LayerConfig:
    """One entry of ``layers`` in a config.json; ``num_experts`` 0 is a dense layer.

    With y = experts(x) and m = mlp(x), the fixed MLP, a layer of experts computes, by ``residual``:

    ``none``         y
    ``sum``          m + y                        PR-MoE as the DeepSpeed-MoE paper has it
    ``learned``      c_0 y + c_1 m, c = softmax(W x + b)   PR-MoE as DeepSpeed's code has it
    ``shared_gate``  y + sigmoid(w x) m           Qwen2-MoE's shared expert
    """

    num_experts: int = 0
    top_k: int = 1
    intermediate_size: int = 0
    expert_intermediate_size: int = 0
    residual: str = "none"
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        if self.residual not in RESIDUAL_KINDS:
            raise ValueError(f"residual ({self.residual}) is not one of {RESIDUAL_KINDS}")
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"[router] top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "layer") -> "LayerConfig":
        """Read one layer of a config.json; ``where`` begins the messages of errors."""
        router = _from_dict(RouterConfig, values.get("router") or {}, f"{where}.router")
        return _from_dict(cls, {**values, "router": router}, where)


@dataclass
class Routing:
    """Which experts each token goes to, and with which weight.

    A choice that was dropped (over capacity) keeps its id in ``expert_ids_TK`` and has weight 0.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    balance_loss: Tensor
    z_loss: Tensor


class Router(nn.Module):
    """logits -> scores -> top-k -> weights, in fp32 whatever the model's dtype is."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, config: RouterConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.top_k = top_k
        self.config = config

    def forward(self, x_TD: Tensor, priority_T: Tensor | None = None) -> Routing:
        """Route T tokens.

        Parameters
        ----------
        x_TD
            The tokens.
        priority_T
            A permutation of the tokens: the order in which they claim places when experts are full.
            By position when left out.
        """
        config = self.config
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.softmax(-1) if config.score_function == "softmax" else logits_TE.sigmoid()
        # A stable sort gives equal scores to the lower expert id; torch.topk promises no order.
        expert_ids_TK = scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if config.normalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * config.routed_scaling
        kept_TK = self._claim_places(expert_ids_TK, priority_T)
        return Routing(
            expert_ids_TK=expert_ids_TK,
            weights_TK=weights_TK * kept_TK,
            kept_TK=kept_TK,
            balance_loss=balance_loss(logits_TE, expert_ids_TK),
            z_loss=logits_TE.logsumexp(-1).square().mean(),
        )

    def _claim_places(self, expert_ids_TK: Tensor, priority_T: Tensor | None) -> Tensor:
        """True where the chosen expert still had a place: all first choices go before any second."""
        num_tokens, num_experts = expert_ids_TK.shape[0], self.weight.shape[0]
        if not self.training or self.config.capacity_factor <= 0:
            return torch.ones_like(expert_ids_TK, dtype=torch.bool)
        capacity = self.config.capacity(num_tokens, num_experts, self.top_k)
        if priority_T is None:
            priority_T = torch.arange(num_tokens, device=expert_ids_TK.device)
        claims_KT = expert_ids_TK[priority_T].T
        claimed_E = F.one_hot(claims_KT.flatten(), num_experts).cumsum(0)
        place_KT = claimed_E.gather(1, claims_KT.flatten()[:, None]).view_as(claims_KT) - 1
        kept_TK = torch.empty_like(expert_ids_TK, dtype=torch.bool)
        kept_TK[priority_T] = place_KT.T < capacity
        return kept_TK


def balance_loss(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """``E * sum_e f_e p_e`` (Switch Transformer eq. 4; DeepSpeed's form for K > 1).

    f_e is the share of all choices, before any is dropped, that go to expert e (no gradient); p_e the
    mean softmax probability of e. It is 1 when both are uniform.
    """
    num_experts = logits_TE.shape[-1]
    share_E = F.one_hot(expert_ids_TK, num_experts).float().mean(dim=(0, 1))
    probability_E = logits_TE.softmax(-1).mean(0)
    return num_experts * (share_E * probability_E).sum()


class MLP(nn.Module):
    """down(activation(up x)), or down(activation(gate x) * (up x)) when gated."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size * (2 if gated else 1), bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.down.writes_residual = True
        self.activation = ACTIVATIONS[activation]
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        return self.down(feed_forward_inner(self.up(x), self.activation, self.gated))


def feed_forward_inner(up: Tensor, activation: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
    """What lies between the up and the down projection."""
    if not gated:
        return activation(up)
    gate, up = up.chunk(2, dim=-1)
    return activation(gate) * up


class ExpertLinear(nn.Module):
    """One linear layer per expert in one tensor, ``[E, out, in]``."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class Experts(nn.Module):
    """The routed experts: for every expert, its tokens through its MLP, added up by weight."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, activation: str, gated: bool, bias: bool
    ) -> None:
        super().__init__()
        self.up = ExpertLinear(num_experts, hidden_size, intermediate_size * (2 if gated else 1), bias)
        self.down = ExpertLinear(num_experts, intermediate_size, hidden_size, bias)
        self.down.writes_residual = True  # tells the initialisation, see CoteriePreTrainedModel
        self.num_experts = num_experts
        self.activation = ACTIVATIONS[activation]
        self.gated = gated

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in range(self.num_experts):
            token, choice = torch.where((routing.expert_ids_TK == expert) & routing.kept_TK)
            y = self.down(feed_forward_inner(self.up(x_TD[token], expert), self.activation, self.gated), expert)
            out_TD = out_TD.index_add(0, token, routing.weights_TK[token, choice, None] * y.float())
        return out_TD.to(x_TD.dtype)
