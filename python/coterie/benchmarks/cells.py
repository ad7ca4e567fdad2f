"""What `coterie bench layer`, `linear`, `step` and `train` measure: the work, its arithmetic and the bytes it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coterie.benchmarks.worker import BenchError

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class LayerCell:
    """A Mixture-of-Experts layer: a router, experts of two matrices with GELU between them, no biases."""

    dtype: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    backward: bool

    kind = "layer"

    def check(self) -> None:
        """Refuse sizes that are none."""
        _check_top_k(self)

    @property
    def flops(self) -> float:
        """Useful arithmetic: the experts' products; the router's are left out."""
        return (3 if self.backward else 1) * 2.0 * self.tokens * self.top_k * 2 * self.hidden * self.ffn

    @property
    def weight_bytes(self) -> int:
        return self.experts * self.expert_bytes

    @property
    def expert_bytes(self) -> int:
        return 2 * self.hidden * self.ffn * DTYPE_BYTES[self.dtype]

    @property
    def activation_bytes(self) -> int:
        """Roughly, and rather too much: a dozen arrays of routed rows."""
        return 12 * self.tokens * self.top_k * max(self.hidden, self.ffn) * 4

    def read_bytes(self, info: dict[str, Any]) -> float:
        """Weights that a forward pass must read: those of the experts that were chosen."""
        return info["experts_hit"] * self.expert_bytes + 4 * self.experts * self.hidden


@dataclass(frozen=True)
class LinearCell:
    """A linear layer without bias: `tokens` rows of `hidden` values to `outputs` values."""

    dtype: str
    tokens: int
    hidden: int
    outputs: int
    backward: bool

    kind = "linear"

    def check(self) -> None:
        """All sizes are possible."""

    @property
    def flops(self) -> float:
        return (3 if self.backward else 1) * 2.0 * self.tokens * self.hidden * self.outputs

    @property
    def weight_bytes(self) -> int:
        return self.hidden * self.outputs * DTYPE_BYTES[self.dtype]

    @property
    def activation_bytes(self) -> int:
        return 6 * self.tokens * max(self.hidden, self.outputs) * 4

    def read_bytes(self, info: dict[str, Any]) -> float:
        return self.weight_bytes


@dataclass(frozen=True)
class StepCell:
    """A step of training a small GPT, every second layer of which has experts: forward, backward, clipping and
    AdamW. `tokens` are sequences of `sequence` tokens."""

    dtype: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    layers: int
    heads: int
    sequence: int
    vocabulary: int
    backward: bool = True

    kind = "step"

    def check(self) -> None:
        """Refuse sizes that are none."""
        _check_top_k(self)
        if self.tokens % self.sequence:
            raise BenchError(f"--tokens: no multiple of --sequence {self.sequence} ({self.tokens})")
        if self.hidden % self.heads:
            raise BenchError(f"--heads: does not divide --hidden {self.hidden} ({self.heads})")

    def _weights(self, experts: int) -> int:
        """Parameters in matrices with `experts` experts in a layer that has any."""
        feed_forward = 2 * self.hidden * self.ffn
        sparse = self.layers // 2
        layers = self.layers * 4 * self.hidden**2 + (self.layers - sparse + sparse * experts) * feed_forward
        return layers + sparse * self.experts * self.hidden + self.vocabulary * self.hidden

    @property
    def flops(self) -> float:
        """Useful arithmetic: six for a parameter that a token meets, and causal attention."""
        attention = 2 * self.sequence * self.hidden * self.layers
        return 3.0 * self.tokens * (2 * self._weights(self.top_k) + attention)

    @property
    def weight_bytes(self) -> int:
        """With master weights, gradients and moments."""
        return 4 * 4 * self._weights(self.experts)

    @property
    def activation_bytes(self) -> int:
        """Roughly, and rather too much."""
        return 4 * self.tokens * (self.layers * (12 * self.hidden + 3 * self.ffn) + 3 * self.vocabulary)

    def read_bytes(self, info: dict[str, Any]) -> float:
        return self.weight_bytes


@dataclass(frozen=True)
class TrainCell(StepCell):
    """The same step, its sequences shared by ranks that are processes of `threads` threads each."""

    ranks: int = 2

    kind = "train"

    def check(self) -> None:
        """Refuse sizes that are none."""
        super().check()
        if self.tokens // self.sequence % self.ranks:
            raise BenchError(f"--ranks: does not divide the {self.tokens // self.sequence} sequences ({self.ranks})")
        if self.experts % self.ranks:
            raise BenchError(f"--ranks: does not divide --experts {self.experts} ({self.ranks})")


Cell = LayerCell | LinearCell | StepCell | TrainCell


def _check_top_k(cell: LayerCell | StepCell) -> None:
    if cell.top_k > cell.experts:
        raise BenchError(f"--top-k: exceeds --experts {cell.experts} ({cell.top_k})")
