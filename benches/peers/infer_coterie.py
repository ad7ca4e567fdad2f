"""Ours, by the public interface of Python."""

from __future__ import annotations

import time
from typing import Any

from infer_worker import Tokens, serve

from coterie import LLM, SamplingParams, __version__


class Coterie:
    def __init__(self, model: str, dtype: str, threads: int, batch: int, length: int, **options: Any) -> None:
        self.llm = LLM(model, dtype=dtype, threads=threads, max_model_len=length, **options)

    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        result = Tokens(len(prompts))
        if not hasattr(self.llm, "stream"):
            return self._one_after_another(prompts, params, result)
        for sequence, delta in self.llm.stream(prompts, params):
            for token in delta.token_ids:
                result.add(sequence, token)
        return result

    def _one_after_another(self, prompts: list[list[int]], params: SamplingParams, result: Tokens) -> Tokens:
        for sequence, prompt in enumerate(prompts):
            begin = time.perf_counter() - result.start
            output = self.llm.generate([prompt], params)[0]
            first, ids = begin + output.prefill_seconds, output.outputs[0].token_ids
            step = output.decode_seconds / max(1, len(ids) - 1)
            result.times[sequence] = [first + i * step for i in range(len(ids))]
            result.token_ids[sequence] = ids
        return result


def load(**arguments: Any) -> tuple[Coterie, str]:
    return Coterie(**arguments), f"coterie {__version__}"


serve(load)
