"""Ours, by the public interface of Python."""

from __future__ import annotations

from typing import Any

from infer_worker import Tokens, serve

from coterie import LLM, SamplingParams, __version__


class Coterie:
    def __init__(self, model: str, dtype: str, threads: int, batch: int, length: int, **options: Any) -> None:
        self.llm = LLM(model, dtype=dtype, threads=threads, max_model_len=length, max_num_seqs=batch, **options)
        self.used = False

    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens:
        if self.used:
            self.settle()
        self.used = True
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        result = Tokens(len(prompts))
        for sequence, delta in self.llm.stream(prompts, params):
            for token in delta.token_ids:
                result.add(sequence, token)
        return result

    def settle(self) -> None:
        """Wait until the weights have moved from the mapped file to where they stay; a first answer does not."""
        while not self.llm.stats["weights_settled"]:
            self.llm.generate([[1]], SamplingParams(max_tokens=1))


def load(**arguments: Any) -> tuple[Coterie, str]:
    return Coterie(**arguments), f"coterie {__version__}"


serve(load)
