"""``experts_implementation="coterie"``: our kernels under the MoE models of Hugging Face transformers.

transformers keeps the experts of a layer in one module with one tensor per matrix and lets a function registered
with ALL_EXPERTS_FUNCTIONS run them. Gated experts in the usual layout ([gate; up] rows, a known activation) run as
one op. All others (transposed or interleaved weights, a gate of the model's own as GPT-OSS's clamped one, other
activations, a norm after each expert) run as two grouped products with the model's own code in between, on the
weights as they lie. Legend: T tokens, K choices of each, D hidden.
"""

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from coterie.torch import functional
from coterie.torch.layers import activation_name


def _has_norm(experts: nn.Module) -> bool:
    """Whether a norm follows each expert, which earlier transformers 5 don't speak of."""
    return getattr(experts, "has_post_expert_norm", False)


def _has_gate(experts: nn.Module) -> bool:
    """Whether the experts are gated, as all of transformers 5.0 are, which doesn't speak of it."""
    return getattr(experts, "has_gate", True)


def _fused_activation(experts: nn.Module) -> str | None:
    """The activation with which one op computes these experts; None if there is none."""
    usual_layout = not experts.is_transposed and not _has_norm(experts)
    gate_first = getattr(experts, "is_concatenated", True)  # 5.0 doesn't speak of it either
    usual_gate = not _has_gate(experts) or (type(experts)._apply_gate is _default_apply_gate and gate_first)
    return activation_name(experts.act_fn) if usual_layout and usual_gate else None


def _run_in_parts(
    experts: nn.Module, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, up: Tensor, up_bias: Tensor | None
) -> Tensor:
    """Sort the choices by expert; two grouped products and what the model has between them; add up the choices."""
    down, down_bias = experts.down_proj, experts.down_proj_bias if experts.has_bias else None
    order, offset = functional.dispatch(expert_ids_TK, up.shape[0])
    inner = functional.grouped_linear(x_TD, offset, up.mT if experts.is_transposed else up, up_bias, order)
    inner = experts._apply_gate(inner) if _has_gate(experts) else experts.act_fn(inner)
    rows = functional.grouped_linear(inner, offset, down.mT if experts.is_transposed else down, down_bias)
    if _has_norm(experts):
        rows = experts.post_expert_norm(rows)
    return functional.combine(rows, order, weights_TK).to(x_TD.dtype)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run an experts module of transformers; ids outside of its experts are choices of none."""
    gated = _has_gate(self)
    name = "gate_up_proj" if gated else "up_proj"
    up, up_bias = getattr(self, name), getattr(self, name + "_bias") if self.has_bias else None
    activation = _fused_activation(self)
    if activation is None:
        return _run_in_parts(self, hidden_states, top_k_index, top_k_weights, up, up_bias)
    down_bias = self.down_proj_bias if self.has_bias else None
    return functional.experts(
        hidden_states, top_k_index, top_k_weights, up, self.down_proj, up_bias, down_bias, activation, gated
    )


ALL_EXPERTS_FUNCTIONS.register("coterie", experts_forward)
