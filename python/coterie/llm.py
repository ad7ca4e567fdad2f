"""LLM: the engine with text in and out. No torch.

>>> from coterie import LLM, SamplingParams
>>> llm = LLM("path/to/model", dtype="bf16")
>>> llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coterie import _engine
from coterie._engine import InvalidArgument
from coterie.outputs import CompletionDelta, CompletionOutput, RequestOutput
from coterie.sampling import SamplingParams, StructuredOutputsParams
from coterie.text_requests import Prompt, TextRequests, is_single_prompt
from coterie.tokenizer import ChatTokenizer

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "resolve_model"]

Messages = list[dict[str, Any]]


def resolve_model(model: str | Path) -> Path:
    """The model that a path means: a Hugging Face directory, a training checkpoint, a .gguf file, or a directory that
    holds exactly one, whole or in parts."""
    path = Path(model)
    if not path.exists():
        raise InvalidArgument(f"{path}: no such file or directory")
    if path.is_file() or any((path / name).is_file() for name in ("config.json", "manifest.json")):
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or not {str(file) for file in files} <= set(_engine.gguf_parts(str(files[0]))):
        raise InvalidArgument(f"{path}: holds neither a config.json nor exactly one .gguf file ({len(files)} found)")
    return files[0]


class LLM:
    """A model that generates text. One thread at a time may call it.

    Parameters
    ----------
    model
        A Hugging Face directory, a .gguf file (of a split one any part), or a directory that holds exactly one.
    dtype
        Of the weights: "fp32", "bf16", "int8", "int8a16", "int4" or "int4_64"; "auto": as `coterie quantize` wrote
        them, else "fp32" where most of the file's weights have 32 bits, else "bf16".
    threads
        0 is as many as the process may use.
    max_model_len
        Tokens of prompt and continuation together; 0 is the model's own limit.
    speculation
        How tokens are guessed ahead: "off", "prompt_lookup" (what followed earlier in the text) or "draft" (what
        draft_model says). Texts stay the same; it is a matter of speed.
    draft_model
        For speculation "draft": a smaller model of the same vocabulary.
    weight_cache_dir
        Where the file of packed weights is kept; None: beside the model.
    engine_options
        attention_dtype, head_dtype, weight_cache, mmap, expert_cache_bytes, load_format, max_num_seqs,
        max_num_batched_tokens, kv_cache_dtype, block_size, num_kv_blocks, kv_cache_bytes, enable_prefix_caching,
        max_speculated_tokens, prompt_lookup_min, prompt_lookup_max and adaptive_speculation, as
        include/coterie/engine.h has them.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str = "auto",
        threads: int = 0,
        max_model_len: int = 0,
        speculation: str = "off",
        draft_model: str | Path | None = None,
        weight_cache_dir: str | Path | None = None,
        **engine_options: Any,
    ) -> None:
        self.path = resolve_model(model)
        self._engine = _engine.Engine(
            str(self.path),
            dtype=dtype,
            threads=threads,
            max_model_len=max_model_len,
            speculation=speculation,
            draft_model="" if draft_model is None else str(resolve_model(draft_model)),
            weight_cache_dir="" if weight_cache_dir is None else str(weight_cache_dir),
            **engine_options,
        )
        end = self.config.get("eos_token_id")
        self.requests = TextRequests(
            self._engine, self.path, end if isinstance(end, list) else [] if end is None else [end]
        )

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded when text is first met: token ids alone need none."""
        return self.requests.tokenizer

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, as that of a CoterieForCausalLM."""
        return json.loads(self._engine.config_json)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and continuation together."""
        return self._engine.max_model_len

    @property
    def stats(self) -> dict[str, int]:
        """Completions that run and wait, blocks of the KV cache and how many are free; preemptions so far, and tokens
        that were guessed ahead and that came true."""
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_text: Callable[[str], None] | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Continue every prompt; they run together.

        Parameters
        ----------
        prompts
            One prompt or several; a prompt is a text or a list of token ids.
        sampling_params
            For all prompts, or one for each. Greedy when left out.
        on_text
            Is given the text of the continuations as it grows, in whole characters.
        priority
            Of all prompts, or one for each: lower ones run first.
        """
        outputs: list[RequestOutput] = []
        for delta in self._run(prompts, sampling_params, priority, outputs):
            if on_text is not None and delta.text:
                on_text(delta.text)
        return outputs

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        priority: int | Sequence[int] = 0,
    ) -> Iterator[tuple[int, CompletionDelta]]:
        """The same, piece by piece: (which prompt, what was added to one of its continuations).

        Closing the iterator ends the requests.
        """
        outputs: list[RequestOutput] = []
        for delta in self._run(prompts, sampling_params, priority, outputs):
            yield next(i for i, output in enumerate(outputs) if output is delta.output), delta

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_text: Callable[[str], None] | None = None,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several: lists of {"role": ..., "content": ...}.

        `tools` and `chat_template_kwargs` (such as {"enable_thinking": False}) are for the model's chat template.
        """
        return self.generate(self.chat_prompts(messages, tools, chat_template_kwargs), sampling_params, on_text)

    def chat_prompts(
        self,
        messages: Messages | list[Messages],
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[list[int]]:
        """Conversations as the model's chat template writes them, up to where the answer begins."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        if not all(conversations) or not conversations:
            raise InvalidArgument("messages: a conversation without a message")
        variables = {"tools": tools, **(chat_template_kwargs or {})}
        return [self.tokenizer.encode_chat(conversation, **variables) for conversation in conversations]

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: row t is the prediction behind token t of the sequence."""
        return self._engine.logits([int(i) for i in token_ids])

    def _run(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
        outputs: list[RequestOutput],
    ) -> Iterator[CompletionDelta]:
        """Fills `outputs`, one for each prompt, and shows them grow."""
        if self.requests.has_unfinished:
            raise InvalidArgument("prompts: a stream of this LLM is not at its end; close it, or use AsyncEngine")
        all_prompts = [prompts] if is_single_prompt(prompts) else list(prompts)
        params = SamplingParams() if sampling_params is None else sampling_params
        all_params = _one_each("sampling_params", params, SamplingParams, all_prompts)
        priorities = _one_each("priority", priority, int, all_prompts)
        prepared = [
            self.requests.prepare(prompt, params, priority)
            for prompt, params, priority in zip(all_prompts, all_params, priorities, strict=True)
        ]
        try:
            outputs.extend(self.requests.add(request) for request in prepared)
            while any(not output.finished for output in outputs):
                for delta in self.requests.step():
                    self.requests.check(delta)
                    yield delta
        finally:  # also of a closed iterator, and after Ctrl-C
            for output in outputs:
                self.requests.abort(output.request_id)


def _one_each(name: str, given: Any, kind: type, prompts: list[Prompt]) -> list[Any]:
    """A list as long as that of the prompts, of one value for all of them or one for each."""
    if isinstance(given, kind):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise InvalidArgument(f"{name}: {len(given)} of them for {len(prompts)} prompts")
    return list(given)
