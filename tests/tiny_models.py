"""Random tiny checkpoints of every architecture, with sizes chosen to be awkward: grouped-query heads,
head_dim other than hidden/heads, odd vocabularies, 7 experts top-3, tied and untied output.

The weights are much larger than a fresh model's, so that logits spread and attention and routing
decide something; biases and norms are random too, so that a forgotten one shows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from coterie.torch import CoterieConfig, CoterieForCausalLM

VOCAB_SIZE = 131
MAX_LENGTH = 320  # several KV blocks of any size up to 128

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SIZES = {**_COMMON, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_MOE_MIX = {"num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 20}


def llama() -> PreTrainedModel:
    config = transformers.LlamaConfig(**_GROUPED, head_dim=14, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def llama_biased_untied() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        **_SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True, rope_theta=500.0
    )
    return transformers.LlamaForCausalLM(config)


def llama_scaled(rope: dict[str, object], **changes: object) -> PreTrainedModel:
    """A Llama with these rope_parameters."""
    config = transformers.LlamaConfig(**{**_GROUPED, "head_dim": 14, **changes}, rope_parameters=rope)
    return transformers.LlamaForCausalLM(config)


def mistral() -> PreTrainedModel:
    """A window far shorter than the prompts."""
    config = transformers.MistralConfig(**_GROUPED, head_dim=14, sliding_window=37)
    return transformers.MistralForCausalLM(config)


def qwen2() -> PreTrainedModel:
    """The last layer has a window, the first two have none."""
    config = transformers.Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=21, max_window_layers=2, tie_word_embeddings=True
    )
    return transformers.Qwen2ForCausalLM(config)


def qwen3() -> PreTrainedModel:
    config = transformers.Qwen3Config(**_GROUPED, head_dim=14, attention_bias=True)
    return transformers.Qwen3ForCausalLM(config)


def granite_moe() -> PreTrainedModel:
    config = transformers.GraniteMoeConfig(
        **_GROUPED,
        num_local_experts=7,
        num_experts_per_tok=3,
        embedding_multiplier=1.7,
        attention_multiplier=0.21,
        residual_multiplier=0.6,
        logits_scaling=3.5,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    return transformers.GraniteMoeForCausalLM(config)


def phimoe() -> PreTrainedModel:
    """A wide router_jitter_noise, so that more than one expert has a part in the weights' softmax.

    Which ones have is a matter of a threshold, where rounding to bf16 decides now and then: the seed is one for
    which that happens as often in the engine as in its emulation.
    """
    config = transformers.PhimoeConfig(
        **_GROUPED, num_local_experts=7, router_jitter_noise=0.3, attention_bias=True, lm_head_bias=True
    )
    return transformers.PhimoeForCausalLM(config)


def glm4_moe() -> PreTrainedModel:
    config = transformers.Glm4MoeConfig(
        **_GROUPED,
        head_dim=20,
        partial_rotary_factor=0.3,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=12,
        n_shared_experts=2,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    )
    return transformers.Glm4MoeForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    """Weights large enough for gates and ups to meet their limits."""
    config = transformers.GptOssConfig(
        **{**_GROUPED, "initializer_range": 0.4},
        head_dim=14,
        num_local_experts=7,
        num_experts_per_tok=3,
        sliding_window=19,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 5.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    )
    return transformers.GptOssForCausalLM(config)


_LATENT = {"kv_lora_rank": 22, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12}
_GROUPED_EXPERTS = {
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}


def deepseek_v2() -> PreTrainedModel:
    """Queries through a bottleneck, the best groups by their best expert."""
    config = transformers.DeepseekV2Config(
        **_SIZES, **_LATENT, **_GROUPED_EXPERTS, q_lora_rank=26, topk_method="group_limited_greedy", attention_bias=True
    )
    return transformers.DeepseekV2ForCausalLM(config)


def deepseek_v2_greedy() -> PreTrainedModel:
    """As DeepSeek-V2-Lite: no bottleneck, no groups, yarn with both mscales."""
    config = transformers.DeepseekV2Config(
        **_SIZES,
        **_LATENT,
        **{**_GROUPED_EXPERTS, "n_group": 1, "topk_group": 1},
        q_lora_rank=None,
        topk_method="greedy",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 5.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.9,
            "original_max_position_embeddings": 64,
        },
    )
    return transformers.DeepseekV2ForCausalLM(config)


def deepseek_v3() -> PreTrainedModel:
    config = transformers.DeepseekV3Config(
        **_SIZES,
        **_LATENT,
        **_GROUPED_EXPERTS,
        num_key_value_heads=6,
        q_lora_rank=26,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 5.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
    )
    return transformers.DeepseekV3ForCausalLM(config)


def deepseek_v3_half_split() -> PreTrainedModel:
    config = transformers.DeepseekV3Config(
        **_SIZES,
        **_LATENT,
        **{**_GROUPED_EXPERTS, "n_shared_experts": 1},
        num_key_value_heads=6,
        q_lora_rank=None,
        norm_topk_prob=False,
        rope_interleave=False,
        num_nextn_predict_layers=0,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**_GROUPED, head_dim=14, num_local_experts=7, num_experts_per_tok=3)
    return transformers.MixtralForCausalLM(config)


def olmoe() -> PreTrainedModel:
    config = transformers.OlmoeConfig(
        **_GROUPED, num_experts=9, num_experts_per_tok=2, norm_topk_prob=False, clip_qkv=1.0, pad_token_id=None
    )
    return transformers.OlmoeForCausalLM(config)


def qwen2_moe() -> PreTrainedModel:
    config = transformers.Qwen2MoeConfig(
        **_GROUPED, **_MOE_MIX, num_experts=7, shared_expert_intermediate_size=36, decoder_sparse_step=2
    )
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **_GROUPED, **_MOE_MIX, num_experts=7, head_dim=14, mlp_only_layers=[1], tie_word_embeddings=True
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(**_COMMON, n_embd=48, n_layer=3, n_head=6, n_inner=100)
    return transformers.GPT2LMHeadModel(config)


def coterie_config(**changes: object) -> CoterieConfig:
    """A pyramid with every residual kind, and a dense layer first."""
    moe = {"expert_intermediate_size": 20, "intermediate_size": 36}
    values = {
        **_COMMON,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "layers": [
            {"num_experts": 0, "intermediate_size": 56},
            {"num_experts": 4, "top_k": 1, "residual": "sum", **moe},
            {"num_experts": 7, "top_k": 3, "expert_intermediate_size": 20, "router": {"normalize": True}},
            {"num_experts": 8, "top_k": 2, "residual": "learned", **moe},
            {"num_experts": 8, "top_k": 1, "residual": "shared_gate", "router": {"routed_scaling": 1.5}, **moe},
        ],
        **changes,
    }
    return CoterieConfig(**values)


def coterie_pyramid() -> PreTrainedModel:
    return CoterieForCausalLM(coterie_config())


def coterie_gpt_style() -> PreTrainedModel:
    """Learned positions, LayerNorm, GELU without a gate, biases everywhere, full QK norm, sigmoid scores."""
    config = coterie_config(
        position_embedding_type="learned",
        norm_type="layer_norm",
        hidden_act="gelu_new",
        gated_mlp=False,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        qk_norm="full",
        tie_word_embeddings=False,
    )
    config.layers[2]["router"] = {"score_function": "sigmoid", "normalize": True}
    return CoterieForCausalLM(config)


def coterie_deepseek_style() -> PreTrainedModel:
    """Groups of experts, sigmoid scores and a bias for the choice, in front of a fixed MLP."""
    router = {"score_function": "sigmoid", "normalize": True, "routed_scaling": 2.5, "choice_bias": True}
    groups = {"num_groups": 4, "top_k_groups": 2}
    moe = {"num_experts": 16, "top_k": 3, "expert_intermediate_size": 20}
    config = coterie_config(
        layers=[
            {"num_experts": 0, "intermediate_size": 56},
            {**moe, "residual": "sum", "intermediate_size": 36, "router": {**router, **groups, "group_score": "top2"}},
            {**moe, "residual": "sum", "intermediate_size": 36, "router": {**router, **groups}},
            {**moe, "num_experts": 7, "top_k": 2, "router": router},
            {**moe, "router": {**groups, "group_score": "top2"}},
        ]
    )
    return CoterieForCausalLM(config)


# Seeds for which no greedy continuation of the tests comes near a tie (they check it).
BUILDERS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "llama": (llama, 5),
    "llama_biased_untied": (llama_biased_untied, 2),
    "mistral": (mistral, 0),
    "qwen2": (qwen2, 2),
    "qwen3": (qwen3, 3),
    "granite_moe": (granite_moe, 0),
    "phimoe": (phimoe, 4),
    "glm4_moe": (glm4_moe, 0),
    "gpt_oss": (gpt_oss, 1),
    "deepseek_v2": (deepseek_v2, 0),
    "deepseek_v2_greedy": (deepseek_v2_greedy, 2),
    "deepseek_v3": (deepseek_v3, 2),
    "deepseek_v3_half_split": (deepseek_v3_half_split, 1),
    "mixtral": (mixtral, 2),
    "olmoe": (olmoe, 6),
    "qwen2_moe": (qwen2_moe, 7),
    "qwen3_moe": (qwen3_moe, 3),
    "gpt2": (gpt2, 7),
    "coterie_pyramid": (coterie_pyramid, 0),
    "coterie_gpt_style": (coterie_gpt_style, 5),
    "coterie_deepseek_style": (coterie_deepseek_style, 0),
}


def seeded(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """The model in fp32, in eval mode, every parameter random."""
    torch.manual_seed(seed)
    model = build().float().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):  # norms lie around 1, biases around 0
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("choice_bias", "e_score_correction_bias")):
                buffer.copy_(0.2 * torch.randn_like(buffer))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(2.0)
    return model


def build(name: str) -> PreTrainedModel:
    """The tiny model of that name."""
    return seeded(*BUILDERS[name])


def changed(name: str, **changes: object) -> PreTrainedModel:
    """The tiny model of that name with other values in its configuration."""
    model = build(name)
    config = type(model.config).from_dict({**model.config.to_dict(), **changes})
    return seeded(lambda: type(model)(config), BUILDERS[name][1])


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write config.json and model.safetensors."""
    model.save_pretrained(directory)
    return directory


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
