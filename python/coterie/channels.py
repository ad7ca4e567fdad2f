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
_NAME_ENDS = re.compile(r" |<\|constrain\|>")  # behind a channel's name: to whom a call goes, in what form


def has_channels(tokenizer: ChatTokenizer) -> bool:
    """Whether a model with this tokenizer writes in channels."""
    return all(tokenizer.backend.token_to_id(mark) is not None for mark in ("<|channel|>", "<|message|>"))


class ChannelStream:
    """Splits text by channels while it arrives. Text in which no channel is named is the answer."""

    def __init__(self) -> None:
        self._channel = ANSWER
        self._in = "<|message|>"  # the mark that came last
        self._waiting = ""  # an end of the text that may begin a mark

    def step(self, piece: str) -> list[tuple[str, str]]:
        """The channels and texts of a piece, of a text whose marks are not left out (``skip_special_tokens=False``).

        A mark may come in several pieces: an end that may begin one waits.
        """
        text = self._waiting + piece
        whole = len(text) - _begun_mark(text)
        self._waiting = text[whole:]
        return self._split(text[:whole])

    def finish(self) -> list[tuple[str, str]]:
        """What waits; no mark came of it."""
        text, self._waiting = self._waiting, ""
        return self._split(text)

    def _split(self, text: str) -> list[tuple[str, str]]:
        parts = []
        for part in _ANY_MARK.split(text):
            if part in _MARKS:
                self._in = part
                # A message that names no channel is in none of those before it.
                self._channel = {"<|start|>": ANSWER, "<|channel|>": ""}.get(part, self._channel)
            elif self._in == "<|channel|>":
                self._channel += part
            elif self._in == "<|message|>" and part:
                parts.append((_NAME_ENDS.split(self._channel)[0], part))
        return parts


def _begun_mark(text: str) -> int:
    """Length of the end of `text` that begins a mark and is not all of it."""
    begin = text.rfind("<")  # the only one in any mark
    end = text[begin:] if begin >= 0 else ""
    return len(end) if any(mark.startswith(end) and mark != end for mark in _MARKS) else 0
