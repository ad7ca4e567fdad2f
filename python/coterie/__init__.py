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
    from coterie.async_engine import AsyncEngine
    from coterie.llm import LLM
    from coterie.sampling import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "CommError",
    "CorruptFile",
    "InvalidArgument",
    "ResourceExhausted",
    "SamplingParams",
    "StructuredOutputsParams",
]

_HOME = {
    "LLM": "coterie.llm",
    "AsyncEngine": "coterie.async_engine",
    "SamplingParams": "coterie.sampling",
    "StructuredOutputsParams": "coterie.sampling",
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
