"""llama.cpp over its C interface, by the bindings of llama-cpp-python: a batch is one decode call of all sequences,
each with a cache of its own; the next token is the largest logit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from infer_worker import Tokens, serve
from llama_cpp import __version__
from llama_cpp import llama_cpp as llama

ROWS = 512  # of a prompt in one call; as many as one pass takes (n_ubatch)
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
# LLAMA_LOAD_MODE: how the file's pages come into memory
CACHES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}
LOAD_MODES = {"read": llama.LLAMA_LOAD_MODE_NONE, "mmap": llama.LLAMA_LOAD_MODE_MMAP}


class LlamaCpp:
    def __init__(
        self,
        model: str,
        dtype: str,
        threads: int,
        batch: int,
        length: int,
        repack: bool = True,
        mmap: bool = False,
        cache: str = "f16",
        flash: str = "auto",
        rows: int = ROWS,
    ) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.load_mode = LOAD_MODES["mmap" if mmap else "read"]
        params.use_extra_bufts = repack
        self.model = llama.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"{model}: llama.cpp could not load it")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.threads, self.length, self.rows = threads, length, rows
        self.cache, self.flash = cache, flash if cache == "f16" else "on"  # it has no other way to read the values
        self.context, self.sequences = None, 0
        self.batch = llama.llama_batch_init(max(rows, batch), 0, 1)

    def generate(self, prompts: list[list[int]], tokens: int) -> Tokens:
        self._open(len(prompts))
        result = Tokens(len(prompts))
        last = [0] * len(prompts)
        for sequence, prompt in enumerate(prompts):
            for first in range(0, len(prompt), self.rows):
                part = prompt[first : first + self.rows]
                ends = first + self.rows >= len(prompt)
                rows = [(token, first + i, sequence, ends and i + 1 == len(part)) for i, token in enumerate(part)]
                self._decode(rows)
            last[sequence] = int(self._logits(len(part) - 1).argmax())
            result.add(sequence, last[sequence])
        for step in range(tokens - 1):
            self._decode([(last[s], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)])
            last = [int(self._logits(row).argmax()) for row in range(len(prompts))]
            for sequence, token in enumerate(last):
                result.add(sequence, token)
        return result

    def _open(self, sequences: int) -> None:
        """A context for so many sequences, empty."""
        if sequences == self.sequences:
            llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
            return
        if self.context:
            llama.llama_free(self.context)
        params = llama.llama_context_default_params()
        params.n_ctx = sequences * (-(-self.length // 256) * 256)
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = self.rows
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = FLASH_ATTENTION[self.flash]
        params.type_k = params.type_v = CACHES[self.cache]
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context for {sequences} sequences")
        self.sequences = sequences

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Rows of token, position, sequence, and whether its logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wanted
        code = llama.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _logits(self, row: int) -> np.ndarray:
        pointer = llama.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))


def load(**arguments: object) -> tuple[LlamaCpp, str]:
    return LlamaCpp(**arguments), f"llama-cpp-python {__version__}"


serve(load)
