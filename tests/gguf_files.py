"""GGUF files of tiny models, written with the gguf package as llama.cpp's converter writes those of large ones."""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedModel


def add_metadata(writer: GGUFWriter, arch: str, model: PreTrainedModel) -> None:
    config = model.config
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(config.intermediate_size)
    if arch != "deepseek2":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    add_expert_metadata(writer, model)
    if arch == "granitemoe":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
    if arch == "olmoe":
        writer.add_clamp_kqv(config.clip_qkv)
    if arch == "deepseek2":
        add_latent_metadata(writer, model)


def add_expert_metadata(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    experts = getattr(config, "n_routed_experts", getattr(config, "num_experts", None))
    experts = experts or getattr(config, "num_local_experts", None)
    if not experts:
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if hasattr(config, "n_shared_experts"):
        sigmoid = config.model_type != "deepseek_v2"
        kinds = gguf.ExpertGatingFuncType
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(sigmoid and config.norm_topk_prob)
        writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def add_latent_metadata(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank:  # as newer files have it
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(key)
        writer.add_value_length(config.v_head_dim)
    if "mscale_all_dim" in config.rope_parameters:
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])


def turned(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Of every head, rows i and i + half as neighbours."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def parts(arch: str, name: str, values: np.ndarray, model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor of transformers as the ones that a converter makes of it, under the names that gguf-py maps."""
    config = model.config
    if arch in ("llama", "granitemoe") and ".q_proj." in name:
        values = turned(values, config.num_attention_heads)
    if arch in ("llama", "granitemoe") and ".k_proj." in name:
        values = turned(values, config.num_key_value_heads)
    for block in (".mlp.experts.", ".block_sparse_moe.experts."):
        if block in name and arch != "gpt-oss":
            prefix = name.split(block)[0] + ".mlp.experts."
            if name.endswith("gate_up_proj"):
                gate, up = np.split(values, 2, axis=1)
                yield prefix + "gate_proj.weight", gate
                yield prefix + "up_proj.weight", up
            else:
                yield prefix + "down_proj.weight", values
            return
    if arch == "gpt-oss" and ".mlp.experts." in name:
        kind = ".bias" if name.endswith("_bias") else ".weight"
        values = values if kind == ".bias" else values.swapaxes(1, 2)
        prefix = name.split(".mlp.experts.")[0] + ".mlp.experts."
        if "gate_up" in name:
            yield prefix + "gate_proj" + kind, values[:, ::2]
            yield prefix + "up_proj" + kind, values[:, 1::2]
        else:
            yield prefix + "down_proj" + kind, values
        return
    if name.endswith("kv_b_proj.weight") and config.q_lora_rank:
        heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, of_values = np.split(heads, [config.qk_nope_head_dim], axis=1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), of_values
        return
    name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
    name = name.replace(".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight")
    if arch == "phimoe":
        name = name.replace(".mlp.router.", ".block_sparse_moe.gate.")
    if name.endswith("sinks"):
        name += ".weight"
    yield name, values


# What a tensor of the file holds: numbers, or the bytes of a type.
Encoded = tuple[np.ndarray, GGMLQuantizationType | None]


def as_fp32(stored: str, values: np.ndarray) -> Encoded:
    """Of every tensor: its values."""
    return np.ascontiguousarray(values, dtype=np.float32), None


def write_model(
    path: Path,
    arch: str,
    model: PreTrainedModel,
    encode: Callable[[str, np.ndarray], Encoded] = as_fp32,
    split_max_tensors: int = 0,
    add: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """The model as a GGUF file, or as several of so many tensors, whose names gguf-py makes of the path's.

    `encode` is given each tensor's name and its values, for most tensors a view of the model's own. `add` may add
    metadata.
    """
    writer = GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    add_metadata(writer, arch, model)
    add(writer)
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for part, values in parts(arch, name, tensor.numpy(), model):
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert stored, f"gguf-py knows no {part}"
            data, kind = encode(stored, values)
            writer.add_tensor(stored, data, raw_dtype=kind)
    rope = model.config.rope_parameters
    if rope["rope_type"] == "llama3":  # by how much each frequency is lower than without scaling
        stretched = model.model.rotary_emb.inv_freq.double().numpy()
        plain = rope["rope_theta"] ** -np.linspace(0, 1, len(stretched), endpoint=False)
        writer.add_tensor("rope_freqs.weight", (plain / stretched).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
