"""A small GPT in plain torch, whose every second layer has experts: what the peers train in cells of kind `step`.

Learned positions, LayerNorm, causal attention, GELU, tied embeddings; AdamW with clipping. The experts are the
peer's own layer. Legend: B sequences, S tokens of one, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from worker import DTYPES, own_batches

MAX_GRAD_NORM = 1.0
# Small, so that routers stay as even as they begin. On random tokens large steps send all tokens to one expert, where
# dropless layers then compute one large product, and one rank does the work of all.
LEARNING_RATE = 1e-6


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class FeedForward(nn.Sequential):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__(nn.Linear(hidden, ffn, bias=False), nn.GELU(), nn.Linear(ffn, hidden, bias=False))


class Block(nn.Module):
    def __init__(self, cell: dict[str, Any], feed_forward: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(cell["hidden"]) for _ in range(2))
        self.attention = Attention(cell["hidden"], cell["heads"])
        self.feed_forward = feed_forward

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.norms[0](x_BSD))
        y = self.feed_forward(self.norms[1](x_BSD).flatten(0, 1))
        return x_BSD + y.view_as(x_BSD)


class Gpt(nn.Module):
    def __init__(self, cell: dict[str, Any], experts: Callable[[dict[str, Any]], nn.Module]) -> None:
        super().__init__()
        D = cell["hidden"]
        self.tokens = nn.Embedding(cell["vocabulary"], D)
        self.positions = nn.Embedding(cell["sequence"], D)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(cell, experts(cell) if layer % 2 else FeedForward(D, cell["ffn"])) for layer in range(cell["layers"])
        )
        self.norm = nn.LayerNorm(D)

    def forward(self, windows_BS: Tensor) -> Tensor:
        """The mean cross entropy of predicting each window's next tokens."""
        inputs, targets = windows_BS[:, :-1], windows_BS[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Training:
    """Steps of plain torch: parameters of the cell's type, fused AdamW; of ranks that `spread` wraps the model for."""

    def __init__(
        self,
        cell: dict[str, Any],
        experts: Callable[[dict[str, Any]], nn.Module],
        spread: Callable[[Gpt], nn.Module] = lambda model: model,
    ) -> None:
        self.model = spread(Gpt(cell, experts).to(DTYPES[cell["dtype"]]).train())
        self.batches = own_batches(cell)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        self.model(next(self.batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
