"""What a model writes in channels, as gpt-oss does (OpenAI's harmony format):

    <|channel|>analysis<|message|>They greet me.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>

Each message names its channel; "final" is the answer, the others are what led to it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.tokenizer import ChatTokenizer

ANSWER = "final"
_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_ANY_MARK = re.compile("(" + "|".join(map(re.escape, _MARKS)) + ")")


def has_channels(tokenizer: ChatTokenizer) -> bool:
    """Whether a model with this tokenizer writes in channels."""
    return all(tokenizer.backend.token_to_id(mark) is not None for mark in ("<|channel|>", "<|message|>"))


class ChannelStream:
    """Splits text by channels while it arrives. Text in which no channel is named is the answer."""

    def __init__(self) -> None:
        self._channel = ANSWER
        self._in = "<|message|>"  # the mark that came last

    def step(self, piece: str) -> list[tuple[str, str]]:
        """The channels and texts of a piece, whose marks are whole and not left out (``skip_special_tokens=False``)."""
        parts = []
        for part in _ANY_MARK.split(piece):
            if part in _MARKS:
                self._in = part
                self._channel = "" if part == "<|channel|>" else self._channel
            elif self._in == "<|channel|>":
                self._channel += part
            elif self._in == "<|message|>" and part:
                parts.append((self._channel.partition(" ")[0], part))  # behind it: to whom a call goes
        return parts
