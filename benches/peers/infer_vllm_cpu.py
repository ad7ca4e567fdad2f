"""vLLM's build for the processor, its engine stepped in this process; with the plug-in zentorch where the environment
has it and the option asks for it."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from infer_worker import Tokens, serve  # noqa: E402


class VllmCpu:
    def __init__(
        self, model: str, dtype: str, threads: int, batch: int, length: int, zentorch: bool = False, cache_gb: int = 2
    ) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cache_gb)
        if not zentorch:
            os.environ["VLLM_PLUGINS"] = ""
        import torch
        import vllm

        torch.set_num_threads(threads)
        self.vllm = vllm
        self.engine = vllm.LLM(
            model,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype],
            max_model_len=length,
            max_num_seqs=batch,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        ).llm_engine
        self.requests = 0

    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens:
        sampling = self.vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        result = Tokens(len(prompts))
        names = {}
        for sequence, prompt in enumerate(prompts):
            name = str(self.requests)
            self.requests += 1
            names[name] = sequence
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                sequence = names[output.request_id]
                for token in output.outputs[0].token_ids[len(result.token_ids[sequence]) :]:
                    result.add(sequence, token)
        return result


def load(**arguments: object) -> tuple[VllmCpu, str]:
    system = VllmCpu(**arguments)
    return system, f"vllm-cpu {system.vllm.__version__}"


serve(load)
