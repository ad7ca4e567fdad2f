"""The requests of an engine with text in and out: what LLM and AsyncEngine share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from coterie import _engine
from coterie._engine import InvalidArgument
from coterie.constraints import Constraints, TokenConstraint
from coterie.outputs import CompletionDelta, CompletionOutput, RequestOutput, logprobs_by_token
from coterie.sampling import SamplingParams
from coterie.tokenizer import ChatTokenizer, StopStrings, StreamDecoder, has_tokenizer

Prompt = str | Sequence[int]


def is_single_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """A text or a list of token ids, and not a list of those."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))


@dataclass
class PreparedRequest:
    """A request whose text is tokens, and whose constraint is compiled."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    priority: int
    constraint: TokenConstraint | None


class TextRequests:
    """Keeps the text of an engine's requests. One thread at a time may call it, but for `prepare`.

    Parameters
    ----------
    engine
        Nobody else may call its step.
    model
        A Hugging Face directory or a .gguf file, for the tokenizer.
    end_token_ids
        The model's own.
    """

    def __init__(self, engine: _engine.Engine, model: Path, end_token_ids: Sequence[int]) -> None:
        self._engine = engine
        self._model = model
        self._end_token_ids = end_token_ids
        self._running: dict[int, _RunningRequest] = {}

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded when text is first met: token ids alone need none."""
        return ChatTokenizer.load(self._model)

    @cached_property
    def constraints(self) -> Constraints:
        """Loaded when the first request asks for one."""
        return Constraints(self.tokenizer.backend, self._engine.vocab_size, self._end_token_ids)

    def prepare(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> PreparedRequest:
        """What may take long before the engine sees a request; InvalidArgument where it is wrong."""
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(text) if text is not None else [int(i) for i in prompt]
        constraint = self.constraints.make(params.structured_outputs) if params.structured_outputs else None
        return PreparedRequest(text, token_ids, params, priority, constraint)

    def add(self, request: PreparedRequest) -> RequestOutput:
        """Hand a request to the engine. The result grows with every step."""
        params = request.params
        tokenizer = self._tokenizer_for(request)
        request_id = self._engine.add_request(
            request.token_ids, params.for_engine(), priority=request.priority, token_mask=request.constraint
        )
        ends = [*params.stop_token_ids, *(() if params.ignore_eos else self._end_token_ids)]
        running = _RunningRequest(request_id, request, tokenizer, frozenset(ends))
        self._running[request_id] = running
        return running.output

    def _tokenizer_for(self, request: PreparedRequest) -> ChatTokenizer | None:
        """None where there is none, or none that we read: token ids still become token ids."""
        needed = request.prompt is not None or request.params.stop
        if not needed and not has_tokenizer(self._model):
            return None
        try:
            return self.tokenizer
        except InvalidArgument:
            if needed:
                raise
            return None

    def abort(self, request_id: int) -> None:
        """Forget a request; nothing happens when it has ended."""
        self._running.pop(request_id, None)
        self._engine.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._running)

    def step(self) -> list[CompletionDelta]:
        """Run the model once; what it added to whom."""
        deltas = []
        for step in self._engine.step():
            running = self._running.get(step.request_id)
            if running is None:
                continue
            delta = running.take(step)
            if delta.finish_reason is not None and step.finish_reason is None:  # a stop string
                self._engine.abort(step.request_id, step.index)
            if running.output.finished:
                del self._running[step.request_id]
            deltas.append(delta)
        return deltas

    @staticmethod
    def check(delta: CompletionDelta) -> None:
        """Raises where a constraint could not be followed to its end."""
        if delta.finish_reason == "error":
            raise InvalidArgument(f"structured_outputs: {delta.output.outputs[delta.index].stop_reason}")


class _RunningRequest:
    """The texts of one request."""

    def __init__(
        self, request_id: int, request: PreparedRequest, tokenizer: ChatTokenizer | None, ends: frozenset[int]
    ) -> None:
        self._params = request.params
        self._ends = ends
        self._constraint = request.constraint
        self._tokenizer = tokenizer
        outputs = [CompletionOutput(index) for index in range(self._params.n)]
        self.output = RequestOutput(request_id, request.prompt, request.token_ids, outputs)
        self._texts = [_TextStream(tokenizer, self._params, request.token_ids) for _ in outputs]

    def take(self, step: _engine.StepOutput) -> CompletionDelta:
        """Add what a step gave to one of the completions."""
        completion, text = self.output.outputs[step.index], self._texts[step.index]
        pieces = []
        new_token_ids = []
        for token_id in step.new_token_ids:
            if step.finish_reason != "stop" or token_id not in self._ends or self._params.include_stop_str_in_output:
                may_stop = len(completion.token_ids) + len(new_token_ids) >= self._params.min_tokens
                pieces.append(text.step(token_id, may_stop))
            new_token_ids.append(token_id)
            if text.stopped is not None:  # what came with the same step is not there
                break
        completion.token_ids.extend(new_token_ids)
        if step.finish_reason is not None and text.stopped is None:
            pieces.append(text.finish())
        if text.stopped is not None:
            completion.finish_reason, completion.stop_reason = "stop", text.stopped
        elif step.finish_reason is not None:
            self._finish(completion, step.finish_reason)
        completion.text += (new_text := "".join(pieces))
        if self._params.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + self._logprobs(step.logprobs[: len(new_token_ids)])
        self._take_facts(step)
        return CompletionDelta(step.index, new_text, new_token_ids, completion.finish_reason, self.output)

    def _finish(self, completion: CompletionOutput, reason: str) -> None:
        completion.finish_reason = reason
        last = completion.token_ids[-1] if completion.token_ids else None
        if self._constraint is not None and self._constraint.error is not None:
            completion.finish_reason, completion.stop_reason = "error", self._constraint.error
        elif reason == "stop" and last in self._params.stop_token_ids:
            completion.stop_reason = last

    def _take_facts(self, step: _engine.StepOutput) -> None:
        if step.index > 0:
            return
        output, timings = self.output, step.timings
        output.num_cached_tokens = step.num_cached_tokens
        output.queue_seconds = timings.queue_seconds
        output.prefill_seconds = timings.prefill_seconds
        output.decode_seconds = timings.decode_seconds
        if self._params.prompt_logprobs is not None and output.prompt_logprobs is None:
            output.prompt_logprobs = [None, *self._logprobs(step.prompt_logprobs)]

    def _logprobs(self, positions: list[_engine.PositionLogprobs]) -> list:
        by_position = [logprobs_by_token(position) for position in positions]
        if self._tokenizer is not None:
            for by_token in by_position:
                for token_id, logprob in by_token.items():
                    logprob.decoded_token = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return by_position


class _TextStream:
    """The text of one continuation while its tokens arrive; stays empty without a tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer | None, params: SamplingParams, prompt: list[int]) -> None:
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, params.skip_special_tokens, prompt)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)

    @property
    def stopped(self) -> str | None:
        """The stop string that came."""
        return self._stops.found

    def step(self, token_id: int, may_stop: bool) -> str:
        """The text that a token completes."""
        if self._decoder is None or self.stopped is not None:
            return ""
        return self._stops.step(self._decoder.step(token_id), may_stop)

    def finish(self) -> str:
        """No token follows: what still waits."""
        if self._decoder is None:
            return ""
        rest = self._stops.step(self._decoder.finish())
        return rest if self.stopped is not None else rest + self._stops.finish()
