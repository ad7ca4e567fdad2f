"""transformers on torch for the processor: its forward pass with a cache, the next token by argmax."""

from __future__ import annotations

import torch
import transformers
from infer_worker import Tokens, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Transformers:
    def __init__(
        self, model: str, dtype: str, threads: int, batch: int, length: int, experts: str = "grouped_mm"
    ) -> None:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=DTYPES[dtype], experts_implementation=experts, local_files_only=True
        ).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens:
        result = Tokens(len(prompts))
        cache = transformers.DynamicCache(config=self.model.config)
        ids_BT = torch.tensor(prompts)
        for _ in range(tokens):
            logits_BTV = self.model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids_BT = logits_BTV[:, -1].argmax(-1, keepdim=True)
            for sequence, token in enumerate(ids_BT[:, 0].tolist()):
                result.add(sequence, token)
        return result


def load(**arguments: object) -> tuple[Transformers, str]:
    return Transformers(**arguments), f"transformers {transformers.__version__}, torch {torch.__version__}"


serve(load)
