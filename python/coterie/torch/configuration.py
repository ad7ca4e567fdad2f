"""CoterieConfig: the config.json of our own models, as transformers sees it."""

from typing import Any

from transformers import PreTrainedConfig

from coterie.torch.moe import ACTIVATIONS, LayerConfig

_CHOICES = {
    "norm_type": ("rms_norm", "layer_norm"),
    "position_embedding_type": ("rope", "learned"),
    "qk_norm": ("none", "head", "full"),
    "hidden_act": tuple(ACTIVATIONS),
}

# What the engine serves and this module does not compute, with the values that mean nothing.
_NOT_TRAINED = {
    "rope_scaling": (None,),
    "rotary_dim": (None, 0),
    "rope_interleaved": (None, False),
    "latent_attention": (None,),
    "attention_sinks": (None, False),
    "lm_head_bias": (None, False),
    "embedding_multiplier": (None, 1),
    "attention_multiplier": (None, 0),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
}


class CoterieConfig(PreTrainedConfig):
    """What a Coterie model is; every layer says what it is made of.

    Parameters
    ----------
    layers
        One dictionary per layer, see :class:`coterie.torch.moe.LayerConfig`.
    qk_norm
        RMSNorm of queries and keys before the rotation: "none", over each "head", or over the "full"
        projection.
    attention_bias, attention_output_bias, mlp_bias
        Biases of the q, k and v projections, of the output projection, of MLPs and experts.
    clip_qkv
        Clamp queries, keys (after their norm) and values to this magnitude; 0 is off.
    """

    model_type = "coterie"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int | None = None
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    norm_type: str = "rms_norm"
    norm_eps: float = 1e-5
    position_embedding_type: str = "rope"
    rope_theta: float = 10000.0
    qk_norm: str = "none"
    clip_qkv: float = 0.0
    hidden_act: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    layers: list[dict[str, Any]] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, nothing in _NOT_TRAINED.items():
            if kwargs.get(name) not in nothing:
                raise ValueError(f"{name} ({kwargs[name]}) is not trained")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layers is None:
            self.layers = [{"intermediate_size": 4 * self.hidden_size} for _ in range(self.num_hidden_layers or 12)]
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.layers)
        super().__post_init__(**kwargs)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} ({getattr(self, name)}) is not one of {allowed}")
        if self.num_hidden_layers != len(self.layers):
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) is not the length of layers ({len(self.layers)})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        self.layer_configs()

    def layer_configs(self) -> list[LayerConfig]:
        """The layers, checked, as dataclasses."""
        return [LayerConfig.from_dict(layer, f"layers[{index}]") for index, layer in enumerate(self.layers)]
