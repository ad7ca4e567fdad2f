"""What weights in few bits do to a real model: SmolLM2-135M on Shakespeare.

Its file is Q4_1, weights that int4 holds exactly and int8 nearly so: what shows are activations in 8 bits.
"""

import math
from pathlib import Path

import pytest

from coterie import _engine
from coterie.corpus import read_corpus
from coterie.data import split_documents
from coterie.tokenizer import ChatTokenizer

WINDOW, WINDOWS = 512, 12


@pytest.fixture(scope="module")
def windows(smollm2: Path) -> list[list[int]]:
    """Token ids of the start of the validation text, behind what Gutenberg says of itself."""
    _, validation = split_documents(read_corpus("shakespeare").documents, 0.05)
    ids = ChatTokenizer.load(smollm2).encode(validation[0].text[20_000:60_000])
    return [ids[start : start + WINDOW + 1] for start in range(0, WINDOW * WINDOWS, WINDOW)]


def loss(model: Path, windows: list[list[int]], dtype: str) -> float:
    """Nats per token."""
    engine = _engine.Engine(str(model), dtype=dtype, weight_cache=False)
    return sum(engine.negative_log_likelihood(window) for window in windows) / (WINDOW * WINDOWS)


@pytest.fixture(scope="module")
def loss_of_bf16(smollm2: Path, windows: list[list[int]]) -> float:
    return loss(smollm2, windows, "bf16")


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.005), ("int4", 0.03)])
def test_perplexity_stays(
    smollm2: Path, windows: list[list[int]], loss_of_bf16: float, dtype: str, most: float
) -> None:
    change = math.expm1(loss(smollm2, windows, dtype) - loss_of_bf16)
    assert change < most
