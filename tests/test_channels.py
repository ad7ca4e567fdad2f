"""Channels of OpenAI's harmony format (its guide's examples), whatever the pieces that a text arrives in."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from coterie.channels import ChannelStream, has_channels
from coterie.tokenizer import ChatTokenizer, StopStrings

TEXTS = {
    "plain": ("Hello, <|not a mark|> you!", [("final", "Hello, <|not a mark|> you!")]),
    "answer": ("<|channel|>final<|message|>Hi\n<b>you</b>.<|return|>", [("final", "Hi\n<b>you</b>.")]),
    "both": (
        "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>final<|message|>Hi!<|return|>",
        [("analysis", "They greet."), ("final", "Hi!")],
    ),
    "call": (
        "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Ulm"}<|call|>',
        [("analysis", "Look it up."), ("commentary", '{"city": "Ulm"}')],
    ),
    "unnamed": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|message|>Hello<|return|>",
        [("analysis", "Hm."), ("final", "Hello")],
    ),
    "form": ('<|channel|>final<|constrain|>json<|message|>{"a": 1}<|return|>', [("final", '{"a": 1}')]),
    "begun": ("<|channel|>final<|message|>1 < 2 <|", [("final", "1 < 2 <|")]),
    "cut": ("<|channel|>analysis<|message|>They", [("analysis", "They")]),
    "nothing": ("<|channel|>final", []),
}


def joined(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    whole: list[tuple[str, str]] = []
    for channel, text in parts:
        if whole and whole[-1][0] == channel:
            whole[-1] = (channel, whole[-1][1] + text)
        else:
            whole.append((channel, text))
    return whole


def tokens_of(text: str) -> list[str]:
    """Marks whole, everything else in pieces of two characters at most."""
    return re.findall(r"<\|\w+\|>|[^<]{1,2}|<", text)


def split(pieces: Iterable[str]) -> list[tuple[str, str]]:
    stream = ChannelStream()
    return joined([part for piece in pieces for part in stream.step(piece)] + stream.finish())


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_split_by_channels(name: str) -> None:
    text, expected = TEXTS[name]
    assert split([text]) == expected
    assert split(tokens_of(text)) == expected
    assert split(text) == expected  # character by character


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("stop", [">>>", "|>!", "<|no"])
def test_stop_strings_may_hold_a_part_of_a_mark_back(name: str, stop: str) -> None:
    text, expected = TEXTS[name]
    stops = StopStrings([stop])
    pieces = [stops.step(token) for token in tokens_of(text)]
    if stops.found is None:
        assert split([*pieces, stops.finish()]) == expected


def test_only_the_beginning_of_a_mark_waits() -> None:
    stream = ChannelStream()
    assert stream.step("Hello <") == [("final", "Hello ")]
    assert stream.step("|b> <|en") == [("final", "<|b> ")]
    assert stream.step("d") == []
    assert stream.finish() == [("final", "<|end")]
    assert stream.finish() == []


def test_only_a_tokenizer_with_the_marks_has_channels(smollm2: Path) -> None:
    tokenizer = ChatTokenizer.load(smollm2)
    assert not has_channels(tokenizer)
    tokenizer.backend.add_special_tokens(["<|channel|>", "<|message|>"])
    assert has_channels(tokenizer)
