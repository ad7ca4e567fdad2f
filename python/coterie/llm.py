"""LLM: the engine with text in and out. No torch.

>>> from coterie import LLM, SamplingParams
>>> llm = LLM("path/to/model", dtype="bf16")
>>> llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coterie import _engine
from coterie._engine import InvalidArgument
from coterie.tokenizer import ChatTokenizer, StopStrings, StreamDecoder, has_tokenizer

Prompt = str | Sequence[int]


@dataclass
class SamplingParams:
    """How the next token is chosen and when generation ends. The defaults are greedy.

    Parameters
    ----------
    max_tokens
        Tokens to generate at most; `max_new_tokens` is another name of it.
    temperature
        0 takes the likeliest token.
    top_k
        Choose among the k likeliest; 0 is all.
    top_p
        Choose among the likeliest that together reach this probability.
    seed
        Equal seeds give equal tokens.
    stop
        Strings that end the text; they are not part of it.
    stop_token_ids
        Tokens that end it, beside the model's own end tokens.
    ignore_eos
        Go on behind the model's end tokens.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: str | list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            self.max_tokens = self.max_new_tokens
        self.max_new_tokens = self.max_tokens
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if not 0 <= self.seed < 2**64:
            raise InvalidArgument(f"seed: {self.seed} is not in [0, 2^64)")
        if "" in self.stop:
            raise InvalidArgument("stop: an empty string ends every text")


@dataclass
class CompletionOutput:
    """One continuation.

    Parameters
    ----------
    token_ids
        All generated tokens, those of a stop string or an end token included.
    finish_reason
        "stop" (an end token or a stop string) or "length".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    """What became of one prompt; `prompt` is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prefill_seconds: float
    decode_seconds: float


def resolve_model(model: str | Path) -> Path:
    """The model that a path means: a Hugging Face directory, a .gguf file, or a directory that holds
    exactly one."""
    path = Path(model)
    if not path.exists():
        raise InvalidArgument(f"{path}: no such file or directory")
    if path.is_file() or (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise InvalidArgument(f"{path}: holds neither a config.json nor exactly one .gguf file ({len(files)} found)")
    return files[0]


class LLM:
    """A model that generates text. One thread at a time may call it.

    Parameters
    ----------
    model
        A Hugging Face directory, a .gguf file, or a directory that holds exactly one.
    dtype
        Of weights and KV cache: "fp32" or "bf16".
    threads
        0 is as many as the process may use.
    max_model_len
        Tokens of prompt and continuation together; 0 is the model's own limit.
    """

    def __init__(self, model: str | Path, dtype: str = "fp32", threads: int = 0, max_model_len: int = 0) -> None:
        self.path = resolve_model(model)
        self._engine = _engine.Engine(str(self.path), dtype=dtype, threads=threads, max_model_len=max_model_len)

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded when text is first met: token ids alone need none."""
        return ChatTokenizer.load(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, as that of a CoterieForCausalLM."""
        return json.loads(self._engine.config_json)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt.

        Parameters
        ----------
        prompts
            One prompt or several; a prompt is a text or a list of token ids.
        sampling_params
            Greedy when left out.
        on_text
            Is given the text of the continuations as it grows, in whole characters.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
        params = sampling_params or SamplingParams()
        return [self._generate_one(prompt, params, on_text) for prompt in ([prompts] if single else prompts)]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several: lists of {"role": ..., "content": ...}."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.tokenizer.encode_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, on_text)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: row t is the prediction behind token t of the sequence."""
        return self._engine.logits([int(i) for i in token_ids])

    def _generate_one(
        self, prompt: Prompt, params: SamplingParams, on_text: Callable[[str], None] | None
    ) -> RequestOutput:
        prompt_token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        # A model without a tokenizer still turns token ids into token ids.
        tokenizer = self.tokenizer if has_tokenizer(self.path) or params.stop else None
        text = _TextStream(tokenizer, params.stop, on_text)
        result = self._engine.generate(
            prompt_token_ids,
            max_new_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            on_token=text.on_token,
        )
        text.finish()
        completion = CompletionOutput(
            index=0,
            text="".join(text.pieces),
            token_ids=list(result["token_ids"]),
            finish_reason="stop" if text.stopped else result["finish_reason"],
        )
        return RequestOutput(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=prompt_token_ids,
            outputs=[completion],
            prefill_seconds=result["prefill_seconds"],
            decode_seconds=result["decode_seconds"],
        )


class _TextStream:
    """The text of one continuation while its tokens arrive; stays empty without a tokenizer."""

    def __init__(
        self, tokenizer: ChatTokenizer | None, stop: Sequence[str], on_text: Callable[[str], None] | None
    ) -> None:
        self.pieces: list[str] = []
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stops = StopStrings(stop)
        self._on_text = on_text

    @property
    def stopped(self) -> bool:
        """A stop string came."""
        return self._stops.found

    def on_token(self, token_id: int) -> bool:
        """Take one token; False ends the generation."""
        if self._decoder is not None:
            self._give(self._stops.step(self._decoder.step(token_id)))
        return not self.stopped

    def finish(self) -> None:
        """No token follows: give out what still waits."""
        if self._decoder is not None and not self.stopped:
            self._give(self._stops.step(self._decoder.finish()))
        if not self.stopped:
            self._give(self._stops.finish())

    def _give(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)
