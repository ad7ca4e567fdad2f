"""AsyncEngine: many callers of one model, each an asyncio task of its own.

>>> async with AsyncEngine("path/to/model", dtype="bf16") as engine:
...     async for delta in engine.stream("Once upon a time", SamplingParams(max_tokens=64)):
...         print(delta.text, end="")
"""

import asyncio
import atexit
import queue
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from coterie.llm import LLM, Messages
from coterie.outputs import CompletionDelta, RequestOutput
from coterie.sampling import SamplingParams
from coterie.text_requests import PreparedRequest, Prompt, TextRequests
from coterie.tokenizer import ChatTokenizer


class EngineStopped(RuntimeError):
    """The engine was closed, or failed, before a request had ended."""


class AsyncEngine:
    """A model whose steps run on one thread, with the GIL released, while asyncio tasks wait for their text.

    Parameters
    ----------
    model
        As for LLM, or an LLM, which nobody else may then call.
    options
        As for LLM.
    """

    def __init__(self, model: str | Path | LLM, **options: Any) -> None:
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._requests: TextRequests = self.llm.requests
        self._commands: queue.SimpleQueue[_Caller | None] = queue.SimpleQueue()
        self._callers: dict[int, _Caller] = {}  # by request, of the engine's thread
        self._stopped: str | None = None
        self._stats = self.llm.stats
        self._thread = threading.Thread(target=self._run, name="coterie-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread must not be in the engine while the interpreter ends

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's."""
        return self.llm.tokenizer

    @property
    def stats(self) -> dict[str, int]:
        """As of LLM, behind the last step."""
        return self._stats

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> AsyncGenerator[CompletionDelta, None]:
        """What is added to the continuations of a prompt, as it comes. Lower priorities run first.

        Closing the generator, or cancelling the task that waits for it, ends the request.
        """
        # Tokenizing and compiling a grammar may take longer than a step.
        request = await asyncio.to_thread(self._requests.prepare, prompt, sampling_params or SamplingParams(), priority)
        caller = _Caller(request)
        self._commands.put(caller)
        if self._stopped is not None:  # perhaps before it saw the caller
            raise EngineStopped(self._stopped)
        running = request.params.n
        try:
            while running > 0:
                delta = await caller.deltas.get()
                if isinstance(delta, BaseException):
                    raise delta
                self._requests.check(delta)
                running -= delta.finish_reason is not None
                yield delta
        finally:
            caller.gone = True
            self._commands.put(caller)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> RequestOutput:
        """The continuations of a prompt, when all have ended."""
        async for delta in self.stream(prompt, sampling_params, priority):
            output = delta.output
        return output

    async def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> RequestOutput:
        """The answer in a conversation."""
        prompts = self.llm.chat_prompts(messages, tools, chat_template_kwargs)
        return await self.generate(prompts[0], sampling_params, priority)

    def close(self) -> None:
        """Ends all requests and the thread; nothing happens when it has ended already."""
        self._commands.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _run(self) -> None:
        """The engine's thread."""
        reason = "the engine was closed"
        try:
            while self._take_commands():
                for delta in self._requests.step():
                    self._give(delta)
        except BaseException as error:  # every caller must hear of it, whatever it is
            reason = f"the engine failed: {error}"
        self._stopped = reason
        self._end_all(EngineStopped(reason))

    def _take_commands(self) -> bool:
        """Waits for one when there is nothing else to do. False: it is time to end."""
        while True:
            self._stats = self.llm.stats
            try:
                caller = self._commands.get(block=not self._requests.has_unfinished)
            except queue.Empty:
                return True
            if caller is None:
                return False
            if caller.gone:
                self._forget(caller)
            else:
                self._add(caller)

    def _add(self, caller: "_Caller") -> None:
        try:
            caller.output = self._requests.add(caller.request)
        except Exception as error:  # the request's own fault
            caller.give(error)
        else:
            self._callers[caller.output.request_id] = caller

    def _forget(self, caller: "_Caller") -> None:
        if caller.output is not None:
            self._requests.abort(caller.output.request_id)
            self._callers.pop(caller.output.request_id, None)

    def _give(self, delta: CompletionDelta) -> None:
        caller = self._callers.get(delta.output.request_id)
        if caller is not None:
            caller.give(delta)

    def _end_all(self, error: Exception) -> None:
        for caller in list(self._callers.values()):
            self._forget(caller)
            caller.give(error)
        while not self._commands.empty():
            caller = self._commands.get()
            if caller is not None and not caller.gone:
                caller.give(error)


class _Caller:
    """A task that waits for a request."""

    def __init__(self, request: PreparedRequest) -> None:
        self.request = request
        self.output: RequestOutput | None = None  # once the engine has the request
        self.gone = False
        self.deltas: asyncio.Queue[CompletionDelta | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def give(self, delta: CompletionDelta | Exception) -> None:
        """From the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self.deltas.put_nowait, delta)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            self.gone = True
