"""SamplingParams: how tokens are chosen and when a text ends. Names and meaning are those of vLLM."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from coterie import _engine
from coterie._engine import InvalidArgument


@dataclass
class StructuredOutputsParams:
    """What a text must look like; exactly one of these. Needs the package `llguidance`.

    Parameters
    ----------
    json
        A JSON schema, as text or as a dict. What is written is JSON that fits it.
    regex
        A regular expression that the whole text matches.
    choice
        Texts of which it is one.
    grammar
        A grammar in the form of Lark.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidArgument(f"structured_outputs: {' and '.join(given) or 'nothing'} given, not exactly one kind")


@dataclass
class SamplingParams:
    """How the next token is chosen and when generation ends. The defaults are greedy.

    What changes logits is applied in this order: structured_outputs, min_tokens, logit_bias, repetition_penalty,
    frequency_penalty, presence_penalty, temperature, min_p, top_k, top_p.

    Parameters
    ----------
    n
        Continuations of each prompt.
    max_tokens
        Tokens to generate at most, None: as many as the model takes; `max_new_tokens` is another name of it.
    min_tokens
        No end token comes before so many tokens, and no stop string ends the text.
    temperature
        0 takes the likeliest token.
    top_k
        Choose among the k likeliest; 0 and -1 are all.
    top_p
        Choose among the likeliest that together reach this probability.
    min_p
        Choose among those at least so many times as likely as the likeliest.
    repetition_penalty
        Above 1: tokens of the prompt and of the text so far become less likely.
    presence_penalty, frequency_penalty
        Above 0: tokens of the text so far become less likely, in the second case with every time that they came.
    logit_bias
        Added to the logits of these token ids.
    seed
        Equal seeds give equal tokens; None and -1 draw one.
    stop
        Strings that end the text; they are not part of it, unless include_stop_str_in_output.
    stop_token_ids
        Tokens that end it, beside the model's own end tokens.
    ignore_eos
        Go on behind the model's end tokens.
    logprobs
        Log-probabilities of each chosen token and of so many of the likeliest, by the model's own logits.
    prompt_logprobs
        The same for the tokens of the prompt.
    skip_special_tokens
        Leave tokens like end-of-text out of the text.
    structured_outputs
        What the text must look like.
    """

    n: int = 1
    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            self.max_tokens = self.max_new_tokens
        self.max_new_tokens = None  # so that max_tokens alone counts from here on
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        if self.seed == -1:
            self.seed = None
        if self.top_k == -1:
            self.top_k = 0
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InvalidArgument(f"seed: {self.seed} is not in [0, 2^64)")
        if "" in self.stop:
            raise InvalidArgument("stop: an empty string ends every text")
        self.for_engine().validate()

    def for_engine(self) -> _engine.SamplingParams:
        """What the engine is told; a seed is drawn where none is given."""
        params = _engine.SamplingParams()
        params.max_new_tokens = _NO_LIMIT
        for name in _OF_ENGINE:
            _set(params, name, name, getattr(self, name))
        if self.max_tokens is not None:
            _set(params, "max_new_tokens", "max_tokens", self.max_tokens)
        params.seed = secrets.randbits(64) if self.seed is None else self.seed
        params.logit_bias = [(int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()]
        return params


def _set(params: _engine.SamplingParams, engine_name: str, name: str, value: object) -> None:
    try:
        setattr(params, engine_name, value)
    except TypeError:
        raise InvalidArgument(f"{name}: {value!r} is not a value of its type") from None


# New tokens, where the model's length alone counts.
_NO_LIMIT = 2**62
# Fields with the same name and meaning in the engine.
_OF_ENGINE = (
    "n",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
)
