"""Ours, by the public interface of Python."""

from __future__ import annotations

import time

from infer_worker import Tokens, serve

from coterie import LLM, SamplingParams, __version__


class Coterie:
    def __init__(self, model: str, dtype: str, threads: int, batch: int, length: int) -> None:
        self.llm = LLM(model, dtype=dtype, threads=threads, max_model_len=length)

    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        result = Tokens(len(prompts))
        for sequence, prompt in enumerate(prompts):  # one after another
            begin = time.perf_counter() - result.start
            output = self.llm.generate([prompt], params)[0]
            first, ids = begin + output.prefill_seconds, output.outputs[0].token_ids
            step = output.decode_seconds / max(1, len(ids) - 1)
            result.times[sequence] = [first + i * step for i in range(len(ids))]
            result.token_ids[sequence] = ids
        return result


def load(**arguments: object) -> tuple[Coterie, str]:
    return Coterie(**arguments), f"coterie {__version__}"


serve(load)
