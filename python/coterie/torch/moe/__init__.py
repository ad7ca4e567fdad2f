"""Router, experts and MLP in plain PyTorch: the slow, obvious version.

It is what a user reads to learn what a Mixture-of-Experts layer computes, and the oracle that the
fast kernels are held against. Legend: T tokens, D hidden, E experts, K experts per token, F inner size, U rows of the
up projection (2F when gated: gate rows first).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.router_choices import MOST_EXPERTS_THAT_CHOOSE, RESIDUALS, ROUTER_CHOICES

MOST_PLACES = 2.0**62  # that still fit the type of a capacity


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
    "swish": F.silu,
}


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Types are what they are, for ops on such a tensor."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


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
    chooser
        "tokens": each token its ``top_k`` experts. "experts": while training, each expert the
        ``capacity`` tokens that score it highest (Zhou et al. 2022).
    num_groups, top_k_groups, group_score
        The experts are cut into groups, and a token chooses within its best ``top_k_groups``. A group
        is worth its best score ("max", DeepSeek-V2) or the sum of its two best ("top2", DeepSeek-V3).
    choice_bias
        The router has a bias per expert, added to the scores for the choice alone (DeepSeek-V3). Training
        moves it against the load: ``coterie train`` itself, else ``Router.update_choice_bias``.
    normalize
        Divide a token's weights by their sum.
    normalize_over
        The sum is over all K that were "chosen", or over those that were "kept", not dropped (at least
        the fp32 epsilon). Where experts choose, always over the kept ones.
    routed_scaling
        Factor on the weights, last of all.
    choice_noise
        Gumbel noise on the logits while training, for the choice alone: for every choice ("rsample") or
        for the second of two ("second_expert", GShard).
    jitter
        While training the router's input is multiplied by factors uniform in 1 - jitter to 1 + jitter.
    capacity_factor, eval_capacity_factor
        0 is dropless. Otherwise an expert takes at most ``capacity`` tokens, while training or not.
    min_capacity
        The floor of ``capacity``.
    drop_policy
        Who gets a full expert's places: "random" and "position": all first choices before any second,
        in each the tokens in a random order or in theirs; "probability": the highest scores.
    """

    score_function: str = "softmax"
    chooser: str = "tokens"
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "max"
    choice_bias: bool = False
    normalize: bool = False
    normalize_over: str = "chosen"
    routed_scaling: float = 1.0
    choice_noise: str = "none"
    jitter: float = 0.0
    capacity_factor: float = 0.0
    eval_capacity_factor: float = 0.0
    min_capacity: int = 4
    drop_policy: str = "random"

    def __post_init__(self) -> None:
        for name, allowed in ROUTER_CHOICES.items():
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"is not one of {allowed}")
        _require(0 <= self.jitter < 1, "jitter", self.jitter, "is not in [0, 1)")
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "is not 0 or a positive number")
        _require(self.min_capacity >= 0, "min_capacity", self.min_capacity, "is negative")
        _require(math.isfinite(self.routed_scaling), "routed_scaling", self.routed_scaling, "is not a finite number")
        if self.chooser == "experts":
            _require(self.capacity_factor > 0, "chooser", "experts", "needs a capacity_factor above 0")
            for name, wanted in (("num_groups", 1), ("choice_noise", "none"), ("choice_bias", False)):
                value = getattr(self, name)
                _require(value == wanted, "chooser", "experts", f"does not go with {name} ({value})")

    def check_sizes(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError when experts, choices and groups do not fit together."""
        _require(top_k >= 1, "top_k", top_k, "is below 1")
        _require(top_k <= num_experts, "top_k", top_k, f"exceeds num_experts ({num_experts})")
        groups, best = self.num_groups, self.top_k_groups
        _require(groups >= 1, "num_groups", groups, "is below 1")
        _require(num_experts % groups == 0, "num_groups", groups, f"does not divide num_experts ({num_experts})")
        _require(1 <= best <= groups, "top_k_groups", best, f"is not in [1, num_groups ({groups})]")
        size = num_experts // groups
        _require(top_k <= best * size, "top_k", top_k, f"exceeds the {best * size} experts in {best} groups")
        if groups > 1 and self.group_score == "top2":
            _require(size >= 2, "group_score", "top2", f"needs two experts in a group, num_groups ({groups})")
        if self.choice_noise == "second_expert":
            _require(top_k == 2, "choice_noise", "second_expert", f"needs top_k 2, not {top_k}")
        if self.chooser == "experts":
            most = MOST_EXPERTS_THAT_CHOOSE
            _require(num_experts <= most, "chooser", "experts", f"allows num_experts up to {most}, not {num_experts}")

    def capacity(self, num_tokens: int, num_experts: int, top_k: int, training: bool) -> int:
        """Tokens that one expert may take out of ``num_tokens``."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor == 0:
            return num_tokens
        # In fp32, rounded as DeepSpeed does: there 1.1 * 10 is 11, in fp64 a little more, and its ceiling 12.
        number = partial(torch.tensor, dtype=torch.float32, device="cpu")
        places = number(num_tokens / num_experts) * number(min(factor * top_k, MOST_PLACES))
        return max(math.ceil(min(places, number(MOST_PLACES))), self.min_capacity)


def _require(condition: bool, name: str, value: object, what: str) -> None:
    if not condition:
        raise ValueError(f"[router] {name} ({value}) {what}")


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
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual ({self.residual}) is not one of {RESIDUALS}")
        if self.num_experts:
            self.router.check_sizes(self.num_experts, self.top_k)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "layer") -> "LayerConfig":
        """Read one layer of a config.json; ``where`` begins the messages of errors."""
        router = _from_dict(RouterConfig, values.get("router") or {}, f"{where}.router")
        return _from_dict(cls, {**values, "router": router}, where)


@dataclass
class Routing:
    """Which experts each token goes to, and with which weight.

    A choice that was dropped (over capacity) keeps its id in ``expert_ids_TK`` and has weight 0. Where
    experts chose, K is E, choice k is expert k, and kept are those that took the token.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    logits_TE: Tensor
    experts_chose: bool = False

    def load(self) -> "Load":
        """How evenly the experts are used."""
        num_experts = self.logits_TE.shape[-1]
        kept_E = torch.bincount(self.expert_ids_TK[self.kept_TK], minlength=num_experts)
        chosen_E = kept_E if self.experts_chose else torch.bincount(self.expert_ids_TK.flatten(), minlength=num_experts)
        return Load(chosen_E, kept_E)

    def balance_loss(self, choices: str = "all", chosen_E: Tensor | None = None) -> Tensor:
        """``E * sum_e f_e p_e`` (Switch Transformer eq. 4; DeepSpeed's form for K > 1).

        f_e is the share of the choices, before any is dropped, that go to expert e (no gradient); p_e
        the mean softmax probability of e. It is 1 when both are uniform, and 0 where experts chose:
        their load is even already.

        Parameters
        ----------
        choices
            "all", or "first": of the first choices alone, as GShard counts.
        chosen_E
            The choices of every expert to take f_e from instead: those of the global batch, summed up over its parts
            and over ranks, let single parts be uneven (``Load.chosen_E``).
        """
        if self.experts_chose:
            return self.logits_TE.new_zeros(())
        num_experts = self.logits_TE.shape[-1]
        if chosen_E is None:
            counted = self.expert_ids_TK if choices == "all" else self.expert_ids_TK[:, :1]
            chosen_E = F.one_hot(counted, num_experts).sum(dim=(0, 1))
        share_E = chosen_E.float() / chosen_E.sum().clamp(min=1)
        return num_experts * (share_E * self._mean(self.logits_TE.softmax(-1))).sum()

    def _mean(self, values_T: Tensor) -> Tensor:
        """Over the tokens; 0 of none."""
        return values_T.sum(0) / max(values_T.shape[0], 1)

    def z_loss(self) -> Tensor:
        """The mean square of logsumexp of the logits (ST-MoE eq. 5)."""
        return self._mean(self.logits_TE.logsumexp(-1).square())


@dataclass
class Load:
    """How evenly the experts of a layer are used, counted over one routing; loads add up.

    Parameters
    ----------
    chosen_E
        [E] int64, choices of every expert before any was dropped.
    kept_E
        [E] int64, those that found a place: its tokens.
    """

    chosen_E: Tensor
    kept_E: Tensor

    def __add__(self, other: "Load") -> "Load":
        return Load(self.chosen_E + other.chosen_E, self.kept_E + other.kept_E)

    def metrics(self) -> dict[str, float]:
        """dropped: share of the choices without a place; entropy of the choices' shares in nats, log(E) when even;
        max_violation: fullest over mean, minus 1 (MaxVio of Wang et al. 2024); dead_experts: without any choice.
        """
        chosen_E = self.chosen_E.double()
        total = max(float(chosen_E.sum()), 1.0)
        return {
            "dropped": 1 - float(self.kept_E.sum()) / total if chosen_E.any() else 0.0,
            "entropy": float(torch.special.entr(chosen_E / total).sum()),
            "max_violation": float(chosen_E.max()) * len(chosen_E) / total - 1 if chosen_E.any() else 0.0,
            "dead_experts": int((chosen_E == 0).sum()),
        }


@dataclass
class RouterDraws:
    """Random choices of one router; what is None is drawn from torch's generator.

    Parameters
    ----------
    order_T
        A permutation of the tokens: in this order they claim places, where drop_policy is "random".
    gumbel_TE
        The noise of choice_noise.
    jitter_TD
        The factors of jitter.
    """

    order_T: Tensor | None = None
    gumbel_TE: Tensor | None = None
    jitter_TD: Tensor | None = None


class Router(nn.Module):
    """logits -> scores -> choices -> weights, in fp32 whatever the model's dtype is."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, config: RouterConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer(
            "choice_bias", torch.zeros(num_experts, dtype=torch.float32) if config.choice_bias else None
        )
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config

    def forward(self, x_TD: Tensor, draws: RouterDraws | None = None) -> Routing:
        """Route T tokens.

        Parameters
        ----------
        x_TD
            The tokens.
        draws
            The random choices, which matter in training mode and for dropping alone.
        """
        draws = draws or RouterDraws()
        x_TD = self._jittered(x_TD, draws).float()
        with without_autocast(x_TD):
            return self.route(F.linear(x_TD, self.weight.float()), draws)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        bias = self.choice_bias
        super()._apply(fn, recurse)
        moved = self.choice_bias
        if moved is not None and moved.dtype != torch.float32:  # its steps are smaller than those of bf16
            of_values = moved if bias.is_meta else bias
            self.choice_bias = of_values.to(moved.device, torch.float32)
        return self

    @torch.no_grad()
    def update_choice_bias(self, chosen_E: Tensor, rate: float = 1e-3) -> None:
        """Balance without a loss: raise the bias of experts that were chosen less than the mean, lower the others'.

        Wang et al. 2024, algorithm 1; DeepSeek-V3, section 2.1.2. Once after each step of the optimizer.

        Parameters
        ----------
        chosen_E
            [E], choices of every expert in the global batch (``Load.chosen_E``, summed up over its parts and ranks).
        rate
            What the bias moves by.
        """
        if self.choice_bias is None:
            raise ValueError("update_choice_bias: the router's configuration has no choice_bias")
        load_E = chosen_E.to(self.choice_bias)
        self.choice_bias += rate * (load_E.mean() - load_E).sign()

    def route(self, logits_TE: Tensor, draws: RouterDraws) -> Routing:
        """Choose and weigh by the logits of T tokens."""
        config = self.config
        experts_choose = self.training and config.chooser == "experts"
        scores_TE = self._scores(logits_TE)
        if experts_choose:
            expert_ids_TK = torch.arange(self.num_experts, device=logits_TE.device).expand_as(scores_TE)
            kept_TK = self._taken(scores_TE)
        else:
            expert_ids_TK = self._choose(logits_TE, scores_TE, draws)
            kept_TK = self._claim_places(expert_ids_TK, scores_TE, draws)
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if config.normalize and (config.normalize_over == "kept" or config.chooser == "experts"):
            kept_sum_T1 = (weights_TK * kept_TK).sum(-1, keepdim=True)
            weights_TK = weights_TK / kept_sum_T1.clamp(min=torch.finfo(torch.float32).eps)
        elif config.normalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * config.routed_scaling * kept_TK
        return Routing(expert_ids_TK, weights_TK, kept_TK, logits_TE, experts_choose)

    def _jittered(self, x_TD: Tensor, draws: RouterDraws) -> Tensor:
        epsilon = self.config.jitter
        if not self.training or epsilon == 0:
            return x_TD
        if draws.jitter_TD is not None:
            return x_TD.float() * draws.jitter_TD
        return x_TD.float() * torch.empty_like(x_TD, dtype=torch.float32).uniform_(1 - epsilon, 1 + epsilon)

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1) if self.config.score_function == "softmax" else logits_TE.sigmoid()

    @torch.no_grad()
    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, draws: RouterDraws) -> Tensor:
        """The experts of each token [T, K], best first."""
        noise = self.config.choice_noise if self.training else "none"
        bias_E = 0.0 if self.choice_bias is None else self.choice_bias.float()
        value_TE = noisy_TE = scores_TE + bias_E
        if noise != "none":
            gumbel_TE = draws.gumbel_TE
            if gumbel_TE is None:
                gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
            noisy_TE = self._scores(logits_TE + gumbel_TE) + bias_E
        allowed_TE = self._in_best_groups(noisy_TE if noise == "rsample" else value_TE)
        if noise != "second_expert":
            return _best_first(noisy_TE, allowed_TE)[:, : self.top_k]
        first_T1 = _best_first(value_TE, allowed_TE)[:, :1]
        allowed_TE = allowed_TE.scatter(1, first_T1, False)
        return torch.cat((first_T1, _best_first(noisy_TE, allowed_TE)[:, :1]), dim=1)

    def _in_best_groups(self, values_TE: Tensor) -> Tensor:
        """True for the experts of the best groups, of equal groups the lower."""
        config = self.config
        values_TGe = values_TE.unflatten(1, (config.num_groups, -1))
        best = 1 if config.group_score == "max" or config.num_groups == 1 else 2
        group_values_TG = values_TGe.topk(best, dim=-1).values.sum(-1)
        groups_Tg = group_values_TG.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k_groups]
        allowed_TG = torch.zeros_like(group_values_TG, dtype=torch.bool).scatter(1, groups_Tg, True)
        return allowed_TG[..., None].expand_as(values_TGe).flatten(1)

    def _claim_places(self, expert_ids_TK: Tensor, scores_TE: Tensor, draws: RouterDraws) -> Tensor:
        """True where the chosen expert still had a place."""
        num_tokens, policy = expert_ids_TK.shape[0], self.config.drop_policy
        capacity = self.config.capacity(num_tokens, self.num_experts, self.top_k, self.training)
        if capacity >= num_tokens:
            return torch.ones_like(expert_ids_TK, dtype=torch.bool)
        if policy == "probability":
            kept_TK = torch.zeros_like(expert_ids_TK, dtype=torch.bool)
            for expert in range(self.num_experts):
                token, choice = torch.where(expert_ids_TK == expert)
                best = scores_TE[token, expert].sort(descending=True, stable=True).indices[:capacity]
                kept_TK[token[best], choice[best]] = True
            return kept_TK
        order_T = torch.arange(num_tokens, device=expert_ids_TK.device)
        if policy == "random":
            order_T = torch.randperm(num_tokens).to(order_T) if draws.order_T is None else draws.order_T
        claims_KT = expert_ids_TK[order_T].T
        claimed_E = F.one_hot(claims_KT.flatten(), self.num_experts).cumsum(0)
        place_KT = claimed_E.gather(1, claims_KT.flatten()[:, None]).view_as(claims_KT) - 1
        kept_TK = torch.empty_like(expert_ids_TK, dtype=torch.bool)
        kept_TK[order_T] = place_KT.T < capacity
        return kept_TK

    def _taken(self, scores_TE: Tensor) -> Tensor:
        """True where the expert is among those whose best tokens include this one."""
        num_tokens = scores_TE.shape[0]
        capacity = self.config.capacity(num_tokens, self.num_experts, self.top_k, self.training)
        tokens_CE = scores_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, tokens_CE, True)


def _best_first(values_TE: Tensor, allowed_TE: Tensor) -> Tensor:
    """Expert ids by falling value, those that are not allowed last; of equal ones the lower id first."""
    # A stable sort, since torch.topk promises no order.
    masked_TE = values_TE.masked_fill(~allowed_TE, -math.inf)
    return masked_TE.sort(dim=-1, descending=True, stable=True).indices


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` in the weight's type, whatever those of x and of the bias are."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


class ExpertLinear(nn.Module):
    """The weights of one linear layer per expert in one tensor, ``[E, out, in]``."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None


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
        kept_ids_TK = routing.expert_ids_TK.where(routing.kept_TK, -1)
        up, down = self.up, self.down
        weights = (up.weight, up.bias, down.weight, down.bias)
        return run_experts(x_TD, kept_ids_TK, routing.weights_TK, *weights, self.activation, self.gated)


def run_experts(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor | None,
    up_EUD: Tensor,
    up_bias_EU: Tensor | None,
    down_EDF: Tensor,
    down_bias_ED: Tensor | None,
    activation: str | Callable[[Tensor], Tensor],
    gated: bool,
) -> Tensor:
    """For every expert, its tokens through its MLP, added up by weight in fp32 (fp64 for tokens in fp64).

    An id outside of [0, E) is a choice of no expert; weights of None are 1.
    """
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    inner = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    sums = torch.promote_types(x_TD.dtype, torch.float32)
    out_TD = torch.zeros_like(x_TD, dtype=sums)
    for e in range(up_EUD.shape[0]):
        token, choice = torch.where(expert_ids_TK == e)
        up = linear(x_TD[token], up_EUD[e], None if up_bias_EU is None else up_bias_EU[e])
        y = linear(
            feed_forward_inner(up, inner, gated), down_EDF[e], None if down_bias_ED is None else down_bias_ED[e]
        ).to(sums)
        out_TD = out_TD.index_add(0, token, y if weights_TK is None else weights_TK[token, choice, None].to(sums) * y)
    return out_TD.to(x_TD.dtype)
