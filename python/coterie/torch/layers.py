"""Modules whose work runs on our kernels: plain nn.Modules, to be used in any model.

They call coterie.torch.functional, which says when our kernels run and when ATen's ops do.
"""

import torch
from torch import Tensor, nn

from coterie.torch import functional, moe
from coterie.torch.moe import ACTIVATIONS, Experts, RouterConfig, RouterDraws, Routing


class Linear(nn.Linear):
    """torch.nn.Linear on our matrix products, in float32 or bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Router(moe.Router):
    """Chooses experts for tokens: logits in float32, choices and weights by our router.

    Parameters
    ----------
    hidden_size, num_experts, top_k
        D, E and K.
    config
        How tokens choose; softmax scores of all experts without dropping when left out.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, config: RouterConfig | None = None) -> None:
        config = RouterConfig() if config is None else config
        config.check_sizes(num_experts, top_k)
        super().__init__(hidden_size, num_experts, top_k, config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Linear begins: uniform within 1 / sqrt(inputs)."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, draws: RouterDraws | None = None, key: Tensor | None = None) -> Routing:
        """Route the tokens of x [..., D]; what it returns is [T, K], with T all tokens in their order.

        ``draws`` fixes the random choices, in plain PyTorch; ``key`` is as in coterie.torch.route, for the jitter too.
        """
        x_TD = x.flatten(0, -2)
        if draws is not None:
            return super().forward(x_TD, draws)
        draws = RouterDraws()
        if key is not None and self.training and self.config.jitter > 0 and functional.uses_kernels(x_TD):
            draws.jitter_TD = torch.ops.coterie.jitter_factors(key, *x_TD.shape, self.config.jitter).to(x_TD.device)
        x_TD = self._jittered(x_TD, draws)
        logits_TE = functional.router_logits(x_TD, self.weight)
        return functional.route(logits_TE, self.top_k, self.config, self.choice_bias, self.training, key)


class GroupedExperts(Experts):
    """E feed-forward experts with one tensor per matrix, run as grouped matrix products.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size
        E, D and F. ``up.weight`` is [E, U, D], ``down.weight`` [E, D, F]; U is 2F when gated (gate rows first).
    activation
        One of the names in ``coterie.torch.moe.ACTIVATIONS``.
    gated
        ``down(activation(gate x) * (up x))`` rather than ``down(activation(up x))``.
    bias
        Whether both layers have one, ``up.bias`` [E, U] and ``down.bias`` [E, D].
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        super().__init__(num_experts, hidden_size, intermediate_size, activation, gated, bias)
        self.activation_name = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as torch.nn.Linear begins: uniform within 1 / sqrt(inputs)."""
        for part in (self.up, self.down):
            bound = part.weight.shape[2] ** -0.5
            for parameter in part.parameters():
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add up ``weight * expert(x)`` over each token's choices.

        Parameters
        ----------
        x
            [..., D].
        expert_ids
            [..., K] int64 or int32; an id outside of [0, E) is a choice of no expert.
        weights
            [..., K], differentiable; 1 when left out.
        """
        flat_weights = None if weights is None else weights.flatten(0, -2)
        out_TD = functional.experts(
            x.flatten(0, -2),
            expert_ids.flatten(0, -2),
            flat_weights,
            self.up.weight,
            self.down.weight,
            self.up.bias,
            self.down.bias,
            self.activation_name,
            self.gated,
        )
        return out_TD.view_as(x)

    def extra_repr(self) -> str:
        E, U, D = self.up.weight.shape
        return f"{E} experts, hidden_size={D}, up rows={U}, activation={self.activation_name}, gated={self.gated}"


# What transformers calls the activations that our kernels have, by class.
_TRANSFORMERS_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "GELUTanh": "gelu_pytorch_tanh",
}
_FUNCTIONS = {torch.relu: "relu", nn.functional.relu: "relu", nn.functional.silu: "silu", nn.functional.gelu: "gelu"}


def activation_name(activation: object) -> str | None:
    """Name a module or function as our kernels do; None for one that they don't have."""
    kind = type(activation)
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    if kind in (nn.ReLU, nn.SiLU):
        return kind.__name__.lower()
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS_ACTIVATIONS.get(kind.__name__)
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None
