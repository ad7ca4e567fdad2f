"""Coterie: trains, compresses and serves Mixture-of-Experts language models.

`coterie.LLM` generates text, `coterie.torch` is for PyTorch users; everything else is the command
`coterie`. Importing this package is quick and loads neither torch nor the engine: names are resolved
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie._engine import CommError, CorruptFile, InvalidArgument, ResourceExhausted
    from coterie.llm import LLM, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CommError", "CorruptFile", "InvalidArgument", "ResourceExhausted", "SamplingParams"]

_HOME = {
    "LLM": "coterie.llm",
    "SamplingParams": "coterie.llm",
    "CommError": "coterie._engine",
    "CorruptFile": "coterie._engine",
    "InvalidArgument": "coterie._engine",
    "ResourceExhausted": "coterie._engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
