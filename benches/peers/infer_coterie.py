"""Ours, by the public interface of Python."""

from __future__ import annotations

from typing import Any

from infer_worker import Tokens, serve

from coterie import LLM, SamplingParams, __version__


class Coterie:
    def __init__(self, model: str, dtype: str, threads: int, batch: int, length: int, **options: Any) -> None:
        self.llm = LLM(model, dtype=dtype, threads=threads, max_model_len=length, max_num_seqs=batch, **options)

    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        result = Tokens(len(prompts))
        for sequence, delta in self.llm.stream(prompts, params):
            for token in delta.token_ids:
                result.add(sequence, token)
        return result


def load(**arguments: Any) -> tuple[Coterie, str]:
    return Coterie(**arguments), f"coterie {__version__}"


serve(load)
