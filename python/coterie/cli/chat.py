"""`coterie chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.channels import ANSWER, ChannelStream, has_channels
from coterie.cli import generation_options as options
from coterie.cli.console import notes

if TYPE_CHECKING:
    from coterie.llm import LLM, Messages
    from coterie.sampling import SamplingParams

_HELP = "/help shows this, /reset forgets the conversation, /exit ends it. Ctrl-C stops an answer, Ctrl-D ends, too."


def chat(
    model: options.ModelArgument,
    system: options.System = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.DType = "auto",
    attention_dtype: options.AttentionDType = "",
    head_dtype: options.HeadDType = "",
    weight_cache: options.WeightCache = True,
    cache_dir: options.CacheDir = None,
    mmap: options.Mmap = False,
    expert_cache_bytes: options.ExpertCacheBytes = 0,
    kv_cache_dtype: options.KvCacheDType = "auto",
    kv_cache_bytes: options.KvCacheBytes = 0,
    threads: options.Threads = 0,
    max_model_len: options.MaxModelLen = 0,
    speculation: options.Speculation = "off",
    draft_model: options.DraftModel = None,
) -> None:
    """Talk with a model. Answers go to stdout as they grow, the rest to stderr; without a terminal, each line of
    stdin is a message."""
    from coterie.llm import LLM
    from coterie.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or [],
    )
    llm = LLM(
        model,
        dtype=dtype,
        attention_dtype=attention_dtype,
        head_dtype=head_dtype,
        weight_cache=weight_cache,
        weight_cache_dir=cache_dir,
        mmap=mmap,
        expert_cache_bytes=expert_cache_bytes,
        threads=threads,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=1,
        speculation=speculation,
        draft_model=draft_model,
    )
    llm.chat_prompts([{"role": "user", "content": "x"}])  # a model without a chat template is refused at once
    Conversation(llm, params, system).run()


class Conversation:
    """What was said so far, and the loop that reads and answers.

    Parameters
    ----------
    system
        What the system message says; None: there is none.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._channels = has_channels(llm.tokenizer)
        self._params = replace(params, skip_special_tokens=not self._channels)
        self._start: Messages = [] if system is None else [{"role": "system", "content": system}]
        self._messages: Messages = list(self._start)
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Until /exit or the end of the input."""
        if self._interactive:
            import readline  # noqa: F401  input() gets a history and line editing

            notes.print(_HELP)
        while (line := self._read()) is not None:
            message = line.strip()
            if message.startswith("/"):
                if message == "/exit":
                    return
                self._command(message)
            elif message:
                self._answer(message)

    def _read(self) -> str | None:
        if not self._interactive:
            return sys.stdin.readline() or None
        try:
            return input("> ")
        except EOFError:
            notes.print()
            return None

    def _command(self, command: str) -> None:
        if command == "/reset":
            self._messages = list(self._start)
            notes.print("forgotten")
        else:
            note = _HELP if command == "/help" else f"{command}: no such command. {_HELP}"
            notes.print(note, markup=False, emoji=False)

    def _answer(self, message: str) -> None:
        messages = [*self._messages, {"role": "user", "content": message}]
        answer: list[str] = []
        channels = ChannelStream() if self._channels else None

        def show(parts: list[tuple[str, str]]) -> None:
            for channel, text in parts:
                if channel == ANSWER:
                    answer.append(text)
                    print(text, end="", flush=True)
                else:  # what leads to the answer is shown, and no part of the conversation
                    notes.print(text, end="", markup=False, emoji=False, soft_wrap=True, style="dim")

        def on_text(piece: str) -> None:
            show([(ANSWER, piece)] if channels is None else channels.step(piece))

        try:
            prompt = self._llm.chat_prompts(messages)[0]
            if not self._fits(prompt):
                return
            self._llm.generate(prompt, self._params, on_text)
            show([] if channels is None else channels.finish())
        except KeyboardInterrupt:
            notes.print(" (stopped)", end="", markup=False)
        print(flush=True)
        self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def _fits(self, prompt: list[int]) -> bool:
        most = self._llm.max_model_len
        if len(prompt) < most:
            return True
        notes.print(f"the conversation has {len(prompt)} tokens, the model's limit is {most}: /reset begins a new one")
        return False
