"""Text to token ids and back, for a model directory or a GGUF file: encoding, chat templates, and
decoding while tokens arrive."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coterie import _engine
from coterie._engine import CorruptFile, InvalidArgument
from coterie.gguf_tokenizer import tokenizer_from_gguf

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What follows a prompt is decoded behind so many of its tokens: enough to be in the middle of a text.
_TOKENS_OF_PROMPT = 8


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is what stands in it."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def has_tokenizer(model: Path) -> bool:
    """Whether a model (a directory or a GGUF file) brings one along."""
    return model.is_file() or (model / "tokenizer.json").is_file()


@dataclass
class ChatTokenizer:
    """A tokenizer and what a chat needs beside it.

    Parameters
    ----------
    source
        The file or directory it came from; it begins the messages of errors.
    chat_template
        Jinja source, None when the model has none.
    special_tokens
        "bos_token", "eos_token", ...: their text, visible to the template.
    """

    backend: tokenizers.Tokenizer
    source: str
    chat_template: str | None
    special_tokens: dict[str, str]

    @classmethod
    def load(cls, model: Path) -> "ChatTokenizer":
        """From `tokenizer.json` beside a model's weights, or from a GGUF file's metadata."""
        return cls._from_gguf(model) if model.is_file() else cls._from_directory(model)

    @classmethod
    def _from_gguf(cls, path: Path) -> "ChatTokenizer":
        metadata = _engine.gguf_metadata(str(path))
        backend = tokenizer_from_gguf(metadata, str(path))
        tokens = metadata["tokenizer.ggml.tokens"]
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        special = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
        return cls(backend, str(path), metadata.get("tokenizer.chat_template"), special)

    @classmethod
    def _from_directory(cls, directory: Path) -> "ChatTokenizer":
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise InvalidArgument(f"{path}: not found; text needs a tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CorruptFile(f"{path}: {error}") from error
        backend.no_truncation()  # what training left in the file; as transformers, prompts stay whole
        backend.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        template_file = directory / "chat_template.jinja"
        template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several templates, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return cls(backend, str(directory), template, special)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load` reads again."""
        self.backend.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids, with the BOS token where the model is used to one."""
        return self.backend.encode(text).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation, up to where the assistant's turn begins."""
        return self.backend.encode(self.render_chat(messages, **variables), add_special_tokens=False).ids

    def render_chat(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The conversation as the model's chat template writes it; `variables` are what else a template asks for."""
        if self._template is None:
            raise InvalidArgument(f"{self.source}: chat_template: the model has none; give a plain prompt")
        try:
            values = {"add_generation_prompt": True, **self.special_tokens, **variables}
            return self._template.render(messages=messages, **values)
        except Exception as error:  # a template is a program, and not ours
            raise InvalidArgument(f"{self.source}: chat_template: {error}") from error

    @cached_property
    def _template(self) -> jinja2.Template | None:
        if self.chat_template is None:
            return None
        # Templates come with downloaded files: they run in a sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise InvalidArgument(f"{self.source}: chat_template: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{path}: not a JSON object")
    return value


# What chat templates expect beside Jinja's own names.
def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class StreamDecoder:
    """Decodes tokens one at a time and gives out whole characters only.

    One token may hold a part of a character, and what a token looks like may depend on its
    predecessors (a SentencePiece word keeps its space only behind another). So every new token is
    decoded behind the tokens of the piece before it, at first behind the end of `prompt`, and a piece
    waits while it ends in a broken character.
    """

    def __init__(self, tokenizer: ChatTokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Of the last piece given out, then those that wait.
        self._token_ids: list[int] = list(prompt[-_TOKENS_OF_PROMPT:])
        self._given = len(self._token_ids)  # how many of them were given out

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none."""
        self._token_ids.append(token_id)
        text = self._waiting_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._token_ids = self._token_ids[self._given :]
        self._given = len(self._token_ids)
        return text

    def finish(self) -> str:
        """What waits, without the broken character at its end."""
        text = self._waiting_text().rstrip(_REPLACEMENT)
        self._token_ids, self._given = [], 0
        return text

    def _waiting_text(self) -> str:
        before = self._tokenizer.decode(self._token_ids[: self._given], self._skip_special_tokens)
        return self._tokenizer.decode(self._token_ids, self._skip_special_tokens)[len(before) :]


class StopStrings:
    """Cuts a stream of text before the first of several stop strings, or behind it.

    The end of the text waits while it may be the beginning of a stop string.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = stop
        self._include = include
        self._waiting = ""
        self.found: str | None = None

    def step(self, piece: str, may_stop: bool = True) -> str:
        """The text that is certain to lie before any stop string; sets `found` to the first one.

        One that ends in a piece that may not stop is passed by.
        """
        text = self._waiting + piece
        places = [(place, stop) for stop in self._stop if may_stop and (place := text.find(stop)) >= 0]
        if places:
            place, self.found = min(places)
            self._waiting = ""
            return text[: place + len(self.found) * self._include]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What waits; no stop string came."""
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is not all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
