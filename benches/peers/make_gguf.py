"""An OlmoeForCausalLM directory as a GGUF file for the peer llama_cpp, in one of its types.

    .venv-peers-llama_cpp/bin/python benches/peers/make_gguf.py MODEL_DIR OUT.gguf bf16|q8_0|q4_0|q4_k_m [BF16.gguf]

bf16 is written by gguf-py, the others are made of that file by llama.cpp's own quantizer. Norms and the router are
fp32, as llama.cpp's converter has them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

FILE_TYPES = {
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
OF_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = ("gate", "up", "down")


class Safetensors:
    """bf16 tensors of a directory, as their bits."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, tuple[np.ndarray, list[int]]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            data = np.memmap(path, np.uint8, "r")
            size = int.from_bytes(data[:8].tobytes(), "little")
            for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    sys.exit(f"{path}: {name}: {entry['dtype']} is not BF16")
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                self.tensors[name] = data[begin:end], entry["shape"]

    def bits(self, name: str) -> np.ndarray:
        data, shape = self.tensors[name]
        return data.view(np.uint16).reshape(shape)


def write_bf16(model: Path, out: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    if config["architectures"] != ["OlmoeForCausalLM"]:
        sys.exit(f"{model / 'config.json'}: architectures: {config['architectures']} is not OlmoeForCausalLM")
    source = Safetensors(model)
    writer = GGUFWriter(out, "olmoe")
    add_config(writer, config)
    add_tokenizer(writer, model, config["vocab_size"])
    pending = list(tensors_of(source, config["num_hidden_layers"], config["num_experts"]))
    for name, _, shape, fp32 in pending:
        if fp32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
        else:  # of what numpy has no type for, the writer wants the shape in bytes
            in_bytes, kind = [*shape[:-1], 2 * shape[-1]], GGMLQuantizationType.BF16
            writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, parts, _, fp32 in pending:
        bits = np.concatenate([source.bits(part).reshape(-1) for part in parts])
        writer.write_tensor_data((bits.astype(np.uint32) << 16).view(np.float32) if fp32 else bits)
    writer.close()


def add_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer: GGUFWriter, model: Path, vocabulary: int) -> None:
    """Byte-level BPE; rows of the embedding without a token are marked as unused."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for entry in tokenizer["added_tokens"]:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def tensors_of(source: Safetensors, layers: int, experts: int) -> Iterator[tuple[str, list[str], list[int], bool]]:
    """Name in GGUF, names of its parts (the experts of a matrix), shape, and whether it is fp32 there."""
    for ours, theirs in OF_MODEL.items():
        yield f"{theirs}.weight", [f"{ours}.weight"], source.tensors[f"{ours}.weight"][1], ours == "model.norm"
    for n in range(layers):
        for ours, theirs in OF_LAYER.items():
            name = f"model.layers.{n}.{ours}.weight"
            shape = source.tensors[name][1]
            yield f"blk.{n}.{theirs}.weight", [name], shape, len(shape) == 1 or ours == "mlp.gate"
        for matrix in EXPERTS:
            parts = [f"model.layers.{n}.mlp.experts.{e}.{matrix}_proj.weight" for e in range(experts)]
            yield f"blk.{n}.ffn_{matrix}_exps.weight", parts, [experts, *source.tensors[parts[0]][1]], False


def quantize(bf16: Path, out: Path, kind: str) -> None:
    from llama_cpp import llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.ftype = int(FILE_TYPES[kind])
    params.nthread = len(os.sched_getaffinity(0))
    if llama.llama_model_quantize(str(bf16).encode(), str(out).encode(), params) != 0:
        sys.exit(f"{bf16}: llama.cpp could not quantize it to {kind}")


def main() -> None:
    model, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    unfinished = out.with_suffix(".part")
    if kind == "bf16":
        write_bf16(model, unfinished)
    else:
        quantize(Path(sys.argv[4]), unfinished, kind)
    unfinished.rename(out)


main()
