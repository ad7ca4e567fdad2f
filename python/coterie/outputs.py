"""What generation gives, in the form that vLLM has it."""

from dataclasses import dataclass, field

from coterie import _engine


@dataclass
class Logprob:
    """The log-probability of a token at a position; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One continuation.

    Parameters
    ----------
    token_ids
        All generated tokens, those of a stop string or an end token included.
    logprobs
        One dict for each of them, by token id, when asked for.
    finish_reason
        "stop" (an end token, a stop string, or nothing that may follow) or "length"; None while it goes on.
    stop_reason
        The stop string, or the id out of stop_token_ids, that ended it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """What became of one prompt; `prompt` is None where token ids were given.

    Parameters
    ----------
    prompt_logprobs
        None for the first token, which nothing predicts, then one dict for each; when asked for.
    num_cached_tokens
        Of the prompt, that an earlier request had computed already.
    queue_seconds, prefill_seconds, decode_seconds
        Until a step took the request along; from there to the first token; from there to the last one.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """Every continuation has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass
class CompletionDelta:
    """What a step added to one continuation.

    Parameters
    ----------
    text
        New characters; they wait while they may be the beginning of a stop string.
    output
        The whole request so far; it grows while the request runs.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    output: RequestOutput


def logprobs_by_token(position: _engine.PositionLogprobs) -> PositionLogprobs:
    """The likeliest tokens and the chosen one, which comes first."""
    by_token = {position.chosen.token_id: Logprob(position.chosen.logprob, position.rank)}
    for rank, token in enumerate(position.top, 1):
        by_token.setdefault(token.token_id, Logprob(token.logprob, rank))
    return by_token
