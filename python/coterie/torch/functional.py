"""The ops of a Mixture-of-Experts layer as functions.

On CPU tensors they run our kernels, the ops ``torch.ops.coterie.*`` that ``coterie._train`` registers, and on meta
tensors those ops' shapes; on other devices, and everywhere inside ``with aten_ops():`` or with
``COTERIE_TORCH_ATEN=1``, ATen ops of the same meaning. Both are differentiable once, and the former go through
``torch.compile(fullgraph=True)``, activation checkpointing and CPU autocast. Activations and weights are float32 or
bfloat16; sums are in float32. What is multiplied is of the weights' type, what comes out of the activations'; under
autocast both are of its type.

Legend: T tokens, D hidden, E experts, K experts per token, F inner size, U rows of the up projection (2F when gated:
gate rows first), V vocabulary, R rows.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from coterie.torch import moe
from coterie.torch.moe import RouterConfig, Routing, run_experts

HAS_KERNELS = find_spec("coterie._train") is not None
if HAS_KERNELS:
    import coterie._train  # noqa: F401  registers the ops

# Tokens whose logits are there at once where ATen's ops run.
LOGITS_CHUNK = 1024

_ROUTER_KEYS = tuple(field.name for field in fields(RouterConfig))

# Of the packed_weights() blocks that last.
_packed_bounds: list[int] = []
_packed_bounds_lock = threading.Lock()

_aten_everywhere = os.environ.get("COTERIE_TORCH_ATEN", "0") == "1"


@contextmanager
def aten_ops() -> Iterator[None]:
    """Run ATen ops on the CPU too, while the block lasts."""
    global _aten_everywhere
    before, _aten_everywhere = _aten_everywhere, True
    try:
        yield
    finally:
        _aten_everywhere = before


@contextmanager
def packed_weights(max_bytes: int | None = None) -> Iterator[None]:
    """Keep weights in the layout that the kernels read fastest, while the block lasts: for inference.

    Every weight that ``experts``, ``linear`` or ``grouped_linear`` use a second time is packed then, once: the experts
    of our modules and of transformers' models, ``Linear``. Results have the same bits with and without. A weight that
    has changed since is packed again: by a step of any torch optimizer, or as torch counts changes (``copy_``,
    ``load_state_dict``). Changes through ``.data`` or numpy are not seen. Gradients are computed as always. Weights
    made within ``torch.inference_mode()`` stay as they are, since torch counts none of their changes.

    Blocks may overlap, in several threads too; the panels are everybody's, and freed when the last block ends.

    Parameters
    ----------
    max_bytes
        How much memory the panels may take beside the weights (of several blocks, the largest counts); what does not
        fit is read where it lies. They are as large as the weights, in bfloat16 on CPUs with AVX-512 three quarters of
        it. When left out, half of the memory that nobody uses when the block begins.
    """
    if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 0):
        raise ValueError(f"max_bytes: {max_bytes!r} is no number of bytes from 0 up")
    if not HAS_KERNELS:
        yield
        return
    bound = coterie._train.unused_memory() // 2 if max_bytes is None else min(max_bytes, sys.maxsize)
    hook = register_optimizer_step_post_hook(_count_changes_of_step)
    with _packed_bounds_lock:
        _packed_bounds.append(bound)
        coterie._train.keep_packed_weights(max(_packed_bounds))
    try:
        yield
    finally:
        with _packed_bounds_lock:
            _packed_bounds.remove(bound)
            coterie._train.keep_packed_weights(max(_packed_bounds, default=0))
        hook.remove()


def _count_changes_of_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Fused optimizers write through pointers, and torch does not count that."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def packed_weight_bytes() -> int:
    """Bytes that ``packed_weights()`` holds at present."""
    return coterie._train.packed_weight_bytes() if HAS_KERNELS else 0


def uses_kernels(x: Tensor) -> bool:
    """Whether the functions of this file run our kernels for such a tensor."""
    return HAS_KERNELS and x.device.type in ("cpu", "meta") and not _aten_everywhere


def result_type(x: Tensor) -> torch.dtype:
    """The type of what the kernels make of x: x's, or that of autocast, which leaves float64 alone."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """Add up, for every token, ``weight * expert(x)`` over its choices.

    Parameters
    ----------
    x
        [T, D], the tokens.
    expert_ids
        [T, K], their choices, int64 or int32; an id outside of [0, E) is a choice of no expert.
    weights
        [T, K], a factor for every choice, differentiable, in float32 or x's dtype; None is 1.
    up, down, up_bias, down_bias
        [E, U, D], [E, D, F], [E, U], [E, D]: the experts, ``down(activation(up x))`` or, gated,
        ``down(activation(gate x) * (up x))``. What does not require a gradient has none computed.
    activation
        "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu" or "swish".

    Returns
    -------
    Tensor
        [T, D] of x's dtype or autocast's; zeros for a token without experts.
    """
    parts = (x, expert_ids, weights, up, up_bias, down, down_bias, activation, gated)
    return torch.ops.coterie.experts(*parts) if uses_kernels(x) else run_experts(*parts).to(result_type(x))


def _to_json(**settings: str | bool | int | float) -> str:
    """An object of JSON. Formatting makes numbers constants of a compiled graph, which the json module could not."""
    values = []
    for name, value in settings.items():
        text = f'"{value}"' if isinstance(value, str) else f"{value}"
        values.append(f'"{name}": {text.lower() if isinstance(value, bool) else text}')
    return "{" + ", ".join(values) + "}"


def _write_settings(num_experts: int, top_k: int, *values: str | bool | int | float) -> str:
    return _to_json(num_experts=num_experts, top_k=top_k, **dict(zip(_ROUTER_KEYS, values, strict=True)))


_written_settings = lru_cache(maxsize=64, typed=True)(_write_settings)


def _settings_of(config: RouterConfig, num_experts: int, top_k: int) -> str:
    """A router as its op wants it. Kept: to write it takes longer than to route a few tokens."""
    values = [getattr(config, name) for name in _ROUTER_KEYS]
    if torch.compiler.is_compiling():  # it is written once anyway
        return _write_settings(num_experts, top_k, *values)
    return _written_settings(int(num_experts), top_k, *values)


def route(
    logits: Tensor,
    top_k: int,
    config: RouterConfig,
    choice_bias: Tensor | None = None,
    training: bool = False,
    key: Tensor | None = None,
) -> Routing:
    """Choose experts for every token and weigh the choices.

    Parameters
    ----------
    logits
        [T, E] float32. The weights of the choices are differentiable with respect to them.
    config
        How; ``jitter`` is not part of it, since it changes what the logits are made of.
    choice_bias
        [E], where the configuration has it.
    training
        Whether noise, the experts' choice and ``capacity_factor`` apply, or ``eval_capacity_factor``.
    key
        [4] int64 on the CPU: seed, step, layer and the number of the first token in the whole batch. Our kernels then
        draw random choices by these and by nothing else, however a batch is cut into parts and spread over ranks.

    Notes
    -----
    Without a key, and in ATen's ops, random choices follow torch's generator, so that torch.manual_seed and activation
    checkpointing repeat them.
    """
    num_experts = logits.shape[1]
    config.check_sizes(num_experts, top_k)
    if (choice_bias is not None) != config.choice_bias:
        what = "missing" if choice_bias is None else "given, but not in the configuration"
        raise ValueError(f"choice_bias is {what}")
    if not uses_kernels(logits):
        router = moe.Router(0, num_experts, top_k, config).train(training)
        router.choice_bias = choice_bias
        return router.route(logits, moe.RouterDraws())
    settings = _settings_of(config, num_experts, top_k)
    capacity_factor = config.capacity_factor if training else config.eval_capacity_factor
    drops_at_random = capacity_factor > 0 and config.drop_policy == "random"
    if key is None and (drops_at_random or (training and config.choice_noise != "none")):
        key = torch.cat([torch.randint(2**62, (1,)), torch.zeros(3, dtype=torch.int64)])
    weights, expert_ids, kept, _ = torch.ops.coterie.route(logits, settings, choice_bias, key, training)
    return Routing(expert_ids, weights, kept, logits, training and config.chooser == "experts")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``x W^T + b`` of x [..., D], as torch.nn.functional.linear.

    x and weight may have different types: they are multiplied in the weight's, and the result has ``dtype``, or x's
    (under autocast, autocast's).
    """
    if uses_kernels(x):
        return torch.ops.coterie.linear(x, weight, bias, dtype=dtype)
    return moe.linear(x, weight, bias).to(result_type(x) if dtype is None else dtype)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in float32 whatever the types are, under autocast too."""
    with moe.without_autocast(x):
        return linear(x, weight.float(), dtype=torch.float32)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross entropy of an output layer, without ever holding all its logits.

    Parameters
    ----------
    hidden
        [..., D], what goes into the output layer.
    weight
        [V, D], the output layer, without a bias.
    targets
        [...], int64; tokens whose target is ``ignore_index`` don't count.

    Returns
    -------
    Tensor
        A float32 scalar, ``cross_entropy(linear(hidden, weight).float(), targets)``.
    """
    hidden_TD, targets_T = hidden.flatten(0, -2), targets.flatten()
    if uses_kernels(hidden):
        return torch.ops.coterie.head_cross_entropy(hidden_TD, weight, targets_T, ignore_index=ignore_index)[0]
    chunks = zip(hidden_TD.split(LOGITS_CHUNK), targets_T.split(LOGITS_CHUNK), strict=True)
    sums = [
        checkpoint(_sum_cross_entropy, hidden, weight, targets, ignore_index, use_reentrant=False)
        for hidden, targets in chunks
    ]
    return torch.stack(sums).sum() / (targets_T != ignore_index).sum()


def _sum_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight).float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


def dispatch(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort choices by expert.

    Returns
    -------
    order
        [T * K] int64: the choices t * K + k grouped by expert, in each group in their order; those of no expert last.
    offset
        [E + 1] int64: those of expert e are ``order[offset[e] : offset[e + 1]]``.
    """
    if uses_kernels(expert_ids):
        return torch.ops.coterie.dispatch(expert_ids, num_experts)
    ids = expert_ids.flatten().long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    offset = torch.searchsorted(ids.sort().values, torch.arange(num_experts + 1, device=ids.device))
    return ids.argsort(stable=True), offset


def grouped_linear(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """Multiply each group of rows with a matrix of its own.

    Parameters
    ----------
    x
        [R, D], rows in groups; or, with an order, [T, D], tokens, which are gathered on the way: row r is token
        ``order[r] // K``.
    offset
        [E + 1] int64: group e is rows ``offset[e]`` to ``offset[e + 1]``.
    weight, bias
        [E, N, D] and [E, N]. The weight may have any strides: a transposed view costs nothing.
    order
        [R] int64 with R = T * K, as ``dispatch`` gives it.

    Returns
    -------
    Tensor
        [R, N] of x's dtype or autocast's; zeros for rows of no group.
    """
    if uses_kernels(x):
        return torch.ops.coterie.grouped_linear(x, offset, weight, bias, order)
    bounds, dtype = offset.tolist(), result_type(x)
    if order is not None:
        top_k = order.shape[0] // x.shape[0] if x.shape[0] else 1
        x = x.index_select(0, order // top_k)
    rows = [x.new_zeros(bounds[0], weight.shape[1], dtype=dtype)]
    for e, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows.append(moe.linear(x[first:last], weight[e], None if bias is None else bias[e]).to(dtype))
    rows.append(x.new_zeros(x.shape[0] - bounds[-1], weight.shape[1], dtype=dtype))
    return torch.cat(rows)


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Add up each token's rows, times their weights: what experts that were run part by part come to.

    Parameters
    ----------
    rows
        [T * K, D], of the choices in their order.
    order
        [T * K] int64, as ``dispatch`` gives it.
    weights
        [T, K], of the choices, of any floating type; differentiable, as rows are.

    Returns
    -------
    Tensor
        [T, D] float32.
    """
    if uses_kernels(rows):
        known = weights.dtype in (torch.float32, torch.bfloat16)
        return torch.ops.coterie.combine(rows, order, weights if known else weights.float())
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    rows_TKD = rows.index_select(0, inverse).view(*weights.shape, rows.shape[-1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows_TKD.to(wide) * weights[..., None].to(wide)).sum(1)
